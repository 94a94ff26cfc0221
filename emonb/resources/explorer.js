// A clickable confusion matrix. Data comes as JSON; labels, file names and texts become text nodes, never markup.
(() => {
  // Siblings instead of an id: each further view of this output is a live copy of its own. A loop: some front ends
  // run a copy of this script at the end of the output.
  let block = document.currentScript.previousElementSibling;
  while (block.type !== "application/json") block = block.previousElementSibling;
  const host = block.previousElementSibling;
  const data = JSON.parse(block.textContent);
  const root = host.shadowRoot || host.attachShadow({ mode: "open" });
  const PAGE = 60;
  const state = { set: 0, model: 0, filter: 0, percent: false, row: 0, col: 0, open: false };

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }
  function choice(label, names, chosen, change) {
    const options = names.map((name, i) => el("option", { value: i, selected: i === chosen && "" }, name));
    const select = el("select", { "aria-label": label, onchange: () => change(select.selectedIndex) }, ...options);
    return el("label", {}, el("span", {}, label), select);
  }
  const images = (n) => `${n} ${n === 1 ? "image" : "images"}`;

  const style = el("style", {}, data.css);
  data.sets.forEach((set, s) => set.sprites.forEach((sprite, k) => {
    style.append(`.s${s}_${k}{background-image:url(data:image/webp;base64,${sprite})}`);
  }));
  const controls = el("div", { class: "controls" });
  const grid = el("div", { class: "grid" });
  const status = el("p", { role: "status", class: "status" });
  const list = el("ul", { role: "list" });
  const more = el("button", { class: "more", type: "button", onclick: () => append(true) });
  const note = el("p", { class: "soft" });
  const panel = el("div", { class: "panel" }, status, list, more);
  const body = el("div", { class: "body" }, grid, panel);
  root.replaceChildren(style, el("section", { "aria-label": "Confusion matrix explorer" }, controls, body, note));

  const set = () => data.sets[state.set];
  const counts = () => set().counts[state.filter][state.model];
  let found = [], shown = 0, buttons = [];

  function drawControls() {
    const now = set();
    const parts = [
      choice("Matrix of", now.models, state.model, (i) => { state.model = i; drawGrid(); }),
      choice("Images", now.filters.map((name, f) => `${name} (${now.totals[f]})`), state.filter,
        (i) => { state.filter = i; drawGrid(); }),
      choice("Show", ["counts", "row %"], Number(state.percent), (i) => { state.percent = i === 1; drawGrid(); }),
    ];
    if (data.sets.length > 1) {
      parts.unshift(choice("Dataset", data.sets.map((one) => one.title), state.set, enter));
    }
    controls.replaceChildren(...parts);
  }
  function enter(i) {
    const model = set().models[state.model];
    const filter = set().filters[state.filter];
    state.set = i;
    state.model = set().models.includes(model) ? set().models.indexOf(model) : set().models.length - 1;
    state.filter = Math.max(0, set().filters.indexOf(filter));
    Object.assign(state, { row: 0, col: 0, open: false });
    drawControls();
    drawGrid();
    controls.querySelector("select").focus(); // drawn anew, so that the focus would be lost
  }

  function drawGrid() {
    const { labels, columns, models } = set();
    const head = columns.map((name) => el("th", { scope: "col", role: "columnheader" }, el("span", {}, name)));
    buttons = [];
    state.focus = null;
    const rows = labels.map((label, r) => {
      const line = counts().slice(r * columns.length, (r + 1) * columns.length);
      const total = line.reduce((a, b) => a + b, 0);
      buttons.push([]);
      const cells = line.map((n, c) => {
        const percent = total ? Math.round((100 * n) / total) : 0;
        // full, high: shades on which the other ink reads better, in light and in dark
        const name = `true ${label}, predicted ${columns[c]}: ${images(n)}, ${percent} % of this row`;
        const button = el("button", {
          type: "button", "aria-label": name, style: `--p:${percent}`, tabindex: -1,
          class: [r === c && "hit", !n && "none", percent >= 93 && "full", percent >= 65 && "high"]
            .filter(Boolean).join(" "),
          onclick: () => select(r, c),
        }, state.percent ? `${percent}` : `${n}`);
        buttons[r].push(button);
        return el("td", { role: "gridcell" }, button);
      });
      return el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }, label), ...cells);
    });
    const caption = el("caption", {}, `${models[state.model]}: rows are the true emotion, columns the answer`
      + (state.percent ? ", in % of the row" : ""));
    const top = el("tr", { role: "row" }, el("th", { "aria-label": "true emotion" }), ...head);
    grid.replaceChildren(el("table", { role: "grid", onkeydown: keys }, caption,
      el("thead", {}, top), el("tbody", {}, ...rows)));
    const embedded = set().id.length;
    const seen = set().counts[0][state.model].reduce((a, b) => a + b, 0);
    note.textContent = `${set().title}: ${set().n} test images. `
      + (seen < set().n ? `${models[state.model]} was asked about ${seen} of them. ` : "") + set().seeds
      + (embedded < set().n ? ` The counts are of all; ${embedded} pictures are in this page: ${set().kept}.` : "");
    mark();
    list.replaceChildren();
    if (state.open) select(state.row, state.col);
    else {
      status.textContent = "Choose a cell to see its images: click it, or go there with the arrow keys and press Enter.";
      more.hidden = true;
    }
  }
  function mark() {
    buttons.forEach((line, r) => line.forEach((button, c) => {
      const here = r === state.row && c === state.col;
      button.tabIndex = here ? 0 : -1;
      button.setAttribute("aria-pressed", here && state.open);
    }));
  }
  function keys(event) {
    const { labels, columns } = set();
    const last = columns.length - 1;
    const { row, col } = state.focus || state;
    const ends = event.ctrlKey || event.metaKey;
    const to = {
      ArrowUp: [row - 1, col], ArrowDown: [row + 1, col], ArrowLeft: [row, col - 1], ArrowRight: [row, col + 1],
      Home: [ends ? 0 : row, 0], End: [ends ? labels.length - 1 : row, last],
    }[event.key];
    if (!to || event.altKey) return;
    event.preventDefault();
    const target = buttons[to[0]]?.[to[1]];
    if (!target) return;
    buttons.flat().forEach((button) => { button.tabIndex = button === target ? 0 : -1; });
    state.focus = { row: to[0], col: to[1] };
    target.focus();
  }

  function select(r, c) {
    Object.assign(state, { row: r, col: c, open: true, focus: { row: r, col: c } });
    mark();
    const now = set();
    const answer = now.answer[state.model], sure = now.sure[state.model];
    const bit = 2 ** state.filter;
    found = now.id.map((_, i) => i)
      .filter((i) => now.label[i] === r && answer[i] === c && now.mask[i] & bit)
      .sort((a, b) => sure[b] - sure[a] || a - b);
    const n = counts()[r * now.columns.length + c];
    const filter = state.filter ? ` (${now.filters[state.filter]})` : "";
    status.textContent = `True ${now.labels[r]}, answer of ${now.models[state.model]}: ${now.columns[c]}. ${images(n)}`
      + filter + (found.length < n ? `, ${found.length} with picture` : "") + (found.length > 1 && sure[found[0]] >= 0 ? ", surest first." : ".");
    shown = 0;
    list.replaceChildren();
    append(false);
  }
  function append(focus) {
    const cards = found.slice(shown, shown + PAGE).map(card);
    shown += cards.length;
    list.append(...cards);
    more.hidden = shown >= found.length;
    more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more of ${found.length}`;
    if (focus && cards.length) {
      cards[0].tabIndex = -1;
      cards[0].focus();
    }
  }
  function card(i) {
    const now = set();
    const [width, height] = now.size[i];
    const at = i % data.tiles;
    const x = (at % data.across) * data.side, y = Math.floor(at / data.across) * data.side;
    const thumb = width
      ? el("div", {
        role: "img", "aria-label": `picture ${now.id[i]}`, class: `thumb s${state.set}_${Math.floor(i / data.tiles)}`,
        style: `width:${width}px;height:${height}px;background-position:-${x}px -${y}px`,
      })
      : el("div", { class: "thumb lost" }, "picture cannot be read");
    const drawn = now.noise[i]; // the emotion of a picture that is mislabelled on purpose
    const answers = now.models.map((model, m) => {
      if (now.answer[m][i] < 0) return ""; // it was not asked
      const right = now.answer[m][i] === now.label[i], fits = now.answer[m][i] === drawn;
      const word = right ? "right" : fits ? "as drawn, not as labelled" : "wrong";
      const sure = now.sure[m][i] < 0 ? "" : ` ${now.sure[m][i]} %`;
      const seeds = now.of[m] > 1 ? `, so say ${now.alike[m][i]} of ${now.of[m]} seeds` : "";
      return el("li", { class: m === state.model ? "this" : null },
        el("span", { class: right || fits ? "right" : "wrong", role: "img", "aria-label": word, title: word },
          right ? "✓" : fits ? "(✓)" : "✗"),
        ` ${model}: `, el("b", {}, now.columns[now.answer[m][i]]), sure, seeds);
    });
    const reasons = (now.text[i] || []).map(([m, text]) =>
      el("details", {}, el("summary", {}, `${now.models[m]} says`), el("p", {}, text),
        ...(now.judged[m] ? [el("p", {}, now.judged[m])] : [])));
    return el("li", { class: "card" }, el("div", { class: "frame" }, thumb),
      el("div", { class: "facts" }, el("code", {}, now.id[i]), el("p", {}, drawn === undefined ? "true: " : "label: ",
        el("b", {}, now.labels[now.label[i]]), drawn === undefined ? "" : `, noise on purpose: drawn as ${now.labels[drawn]}`),
        el("ul", { role: "list", class: "answers" }, ...answers), ...reasons));
  }

  const scheme = matchMedia("(prefers-color-scheme: dark)");
  function theme() {
    const told = document.body.dataset.jpThemeLight; // JupyterLab and its exported pages say it here
    host.toggleAttribute("data-dark",
      told ? told === "false" : scheme.matches || document.body.classList.contains("vscode-dark"));
  }
  scheme.addEventListener("change", theme);
  new MutationObserver(theme).observe(document.body, { attributeFilter: ["data-jp-theme-light", "class"] });
  theme();
  state.model = set().models.length - 1;
  drawControls();
  drawGrid();
})();
