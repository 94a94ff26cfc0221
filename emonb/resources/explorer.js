// A clickable confusion matrix. Data comes as JSON; labels, file names and texts become text nodes, never markup.
(() => {
  // Siblings instead of an id: each further view of this output is a live copy of its own. A loop: some front ends
  // run a copy of this script at the end of the output.
  let block = document.currentScript.previousElementSibling;
  while (block.type !== "application/json") block = block.previousElementSibling;
  const host = block.previousElementSibling;
  const data = JSON.parse(block.textContent);
  const root = host.shadowRoot || host.attachShadow({ mode: "open" });
  const PAGE = 60, SAMPLE = "random sample";
  const state = {
    set: 0, model: 0, filter: 0, percent: false, row: 0, col: 0, also: new Map(), // also: other models' answers
    shows: "", review: false, // shows: "", "cell" or "sample"
  };

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
  const press = (name, click, more) => el("button", { type: "button", onclick: click, ...more }, ...[name].flat());
  const images = (n) => `${n} ${n === 1 ? "image" : "images"}`;
  const number = (text, i) => text.charCodeAt(i) - 48; // see _packed

  const style = el("style", {}, data.css);
  data.sets.forEach((set, s) => set.sprites.forEach((sprite, k) => {
    style.append(`.s${s}_${k}{background-image:url(data:image/webp;base64,${sprite})}`);
  }));
  const controls = el("div", { class: "controls" });
  const desk = el("div", { class: "desk" });
  const grid = el("div", { class: "grid" });
  const status = el("p", { role: "status", class: "status" });
  const bars = el("div", { class: "bars" });
  const tools = el("p", { class: "tools" });
  const list = el("ul", { role: "list" });
  const more = press("", () => append(true), { class: "more" });
  const note = el("p", { class: "soft" });
  const panel = el("div", { class: "panel" }, status, bars, tools, list, more);
  const body = el("div", { class: "body" }, grid, panel);
  const large = el("ul", { role: "list" });
  const count = el("span", { role: "status" });
  const dialog = el("dialog", {
    "aria-label": "Large picture", onclose: () => large.replaceChildren(),
    onclick: (event) => { if (event.target === dialog) dialog.close(); },
    onkeydown: (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) enlarge(at + step);
    },
  }, el("p", { class: "tools" }, press("← before", () => enlarge(at - 1)), press("next →", () => enlarge(at + 1)),
    press("close", () => dialog.close()), count), large);
  root.replaceChildren(style, el("section", { "aria-label": "Confusion matrix explorer" }, controls, desk, body, note),
    dialog);

  const set = () => data.sets[state.set];
  const answer = (m, i) => number(set().answer[m], i);
  const embedded = (i) => i < set().size.length;
  const kept = (i, f) => number(set().mask, i) & (2 ** f);
  const inLab = document.querySelector("#jupyter-config-data"); // its address is its own
  let ready = false; // whether what is drawn is somebody's choice
  let all = [], found = [], shown = 0, at = 0, buttons = []; // all: images of the view; found: those with a picture

  function drawControls() {
    const now = set();
    const total = (f) => now.id.reduce((n, _, i) => n + (kept(i, f) ? 1 : 0), 0);
    const parts = [
      choice("Matrix of", now.models, state.model, (i) => { state.model = i; state.also.clear(); toCell(); drawGrid(); }),
      choice("Images", now.filters.map((name, f) => `${name} (${total(f)})`), state.filter,
        (i) => { state.filter = i; toCell(); drawGrid(); }),
      choice("Show", ["counts", "row %"], Number(state.percent), (i) => { state.percent = i === 1; drawGrid(); }),
      press("Review labels", () => {
        state.review = !state.review;
        drawControls();
        drawGrid();
        controls.querySelector(".wish").focus();
      }, { class: "wish", "aria-pressed": state.review }),
    ];
    if (data.sets.length > 1) {
      parts.unshift(choice("Dataset", data.sets.map((one) => one.title), state.set, enter));
    }
    controls.replaceChildren(...parts);
    drawDesk();
  }
  function toCell() { // a sample is of all images: a choice of some leaves it
    if (state.shows === "sample") state.shows = "";
  }
  function enter(i) {
    const model = set().models[state.model];
    const filter = set().filters[state.filter];
    state.set = i;
    state.model = set().models.includes(model) ? set().models.indexOf(model) : set().models.length - 1;
    state.filter = Math.max(0, set().filters.indexOf(filter));
    state.also.clear();
    Object.assign(state, { row: 0, col: 0, shows: "" });
    drawControls();
    drawGrid();
    controls.querySelector("select").focus(); // drawn anew, so that the focus would be lost
  }

  function drawGrid() {
    const { labels, columns, models, label } = set();
    const head = columns.map((name) => el("th", { scope: "col", role: "columnheader" }, el("span", {}, name)));
    const counts = labels.map(() => columns.map(() => 0));
    set().id.forEach((_, i) => {
      const said = answer(state.model, i); // below 0: it was not asked
      if (said >= 0 && kept(i, state.filter)) counts[number(label, i)][said] += 1;
    });
    buttons = [];
    state.focus = null;
    const rows = labels.map((name, r) => {
      const total = counts[r].reduce((a, b) => a + b, 0);
      buttons.push([]);
      const cells = counts[r].map((n, c) => {
        const percent = total ? Math.round((100 * n) / total) : 0;
        const about = `true ${name}, answer ${columns[c]}: ${images(n)}, ${percent} % of this row`;
        const button = press(state.percent ? `${percent}` : `${n}`, (event) => {
          state.also.clear();
          select(r, c);
          // on a phone the result is below the matrix; a key leaves the focus, and the page, where they are
          if (event.detail && panel.offsetTop > grid.offsetTop) panel.scrollIntoView();
        }, {
          "aria-label": about, style: `--p:${percent}`, tabindex: -1,
          class: [r === c && "hit", !n && "none"].filter(Boolean).join(" "),
        });
        buttons[r].push(button);
        return el("td", { role: "gridcell" }, button);
      });
      return el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }, name), ...cells);
    });
    const caption = el("caption", {}, models[state.model] + (state.percent ? ", in % of the row" : ""));
    const axes = [el("b", {}, "answer →"), el("b", {}, "true emotion ↓")];
    const top = el("tr", { role: "row" }, el("th", { class: "axes" }, el("div", {}, ...axes)), ...head);
    grid.replaceChildren(el("table", { role: "grid", onkeydown: keys }, caption,
      el("thead", {}, top), el("tbody", {}, ...rows)));
    const few = set().size.length, n = set().id.length;
    const seen = set().id.filter((_, i) => answer(state.model, i) >= 0).length;
    const told = set().text.map((texts, m) => [models[m], Object.keys(texts).length])
      .filter(([, of]) => of && of < n).map(([model, of]) => ` ${model} was asked for a reason for ${of} of them.`);
    note.textContent = `${set().title}: ${n} test images. `
      + (seen < n ? `${models[state.model]} was asked about ${seen} of them. ` : "")
      + (set().of.some((seeds) => seeds > 1) ? "Of models with several seeds the first is shown." : "") + told.join("")
      + (few < n ? ` The counts are of all; ${few} pictures are in this page: ${set().kept}.` : "");
    mark();
    if (state.shows === "sample") sample();
    else if (state.shows) select(state.row, state.col);
    else {
      [bars, tools, list].forEach((part) => part.replaceChildren());
      status.textContent = "Choose a cell to see its images: click it, or go there with the arrow keys and press Enter.";
      more.hidden = true;
      follow();
    }
  }
  function mark() {
    buttons.forEach((line, r) => line.forEach((button, c) => {
      const here = r === state.row && c === state.col;
      button.tabIndex = here ? 0 : -1;
      button.setAttribute("aria-pressed", here && state.shows === "cell");
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
    Object.assign(state, { row: r, col: c, shows: "cell", focus: { row: r, col: c } });
    mark();
    const now = set(), sure = now.sure[state.model];
    const cell = now.id.map((_, i) => i)
      .filter((i) => number(now.label, i) === r && answer(state.model, i) === c && kept(i, state.filter))
      .sort((a, b) => number(sure, b) - number(sure, a) || (now.id[a] < now.id[b] ? -1 : 1));
    const also = [...state.also].map(([m, k]) => `, of ${now.models[m]}: ${now.columns[k]}`).join("");
    drawBars(cell);
    show(cell.filter((i) => passes(i)),
      `True ${now.labels[r]}, answer of ${now.models[state.model]}: ${now.columns[c]}${also}. `,
      state.filter ? ` (${now.filters[state.filter]})` : "", number(sure, cell[0] ?? 0) >= 0 ? "surest first" : "");
  }
  const passes = (i, but) => [...state.also].every(([m, k]) => m === but || answer(m, i) === k);
  function sample() {
    state.shows = "sample";
    mark();
    bars.replaceChildren();
    show(set().sample, `A random sample of all ${set().id.length} test images: `, "", "in random order");
  }
  function show(view, before, after, order) {
    all = view;
    found = view.filter(embedded);
    status.textContent = before + images(all.length) + after
      + (found.length < all.length ? `, ${found.length} with picture` : "") + (found.length > 1 && order ? `, ${order}.` : ".");
    tools.replaceChildren(press("CSV of these images", () => save(`${fileName()}.csv`, "text/csv", csv(all))),
      inLab ? "" : el("a", { href: link() }, "Link to this view"));
    follow();
    shown = 0;
    list.replaceChildren();
    append(false);
  }

  // For each other model a bar of its answers; a part of it is a button that keeps its images alone.
  function drawBars(cell) {
    const now = set();
    const order = (c) => (c === state.row ? -2 : c === state.col ? -1 : 0); // as labelled, as this model, others
    const lines = now.models.map((model, m) => {
      if (m === state.model) return "";
      const among = cell.filter((i) => passes(i, m) && answer(m, i) >= 0), counts = now.columns.map(() => 0);
      among.forEach((i) => { counts[answer(m, i)] += 1; });
      const named = [...counts.keys()].filter((c) => counts[c])
        .sort((a, b) => order(a) - order(b) || counts[b] - counts[a]);
      const parts = named.map((c) => press([el("span", {}, `${counts[c]}`), " ", el("span", {}, now.columns[c])], () => {
        if (state.also.get(m) === c) state.also.delete(m);
        else state.also.set(m, c);
        select(state.row, state.col);
        bars.querySelector(`[data-part="${m} ${c}"]`)?.focus();
      }, {
        "aria-label": `${model} says ${now.columns[c]}: ${counts[c]} of ${images(among.length)}`,
        title: `${now.columns[c]}: ${counts[c]} of ${among.length}`, style: `--n:${counts[c]}`, "data-part": `${m} ${c}`,
        "aria-pressed": state.also.get(m) === c, class: ["right", "same", ""][order(c) + 2],
      }));
      const all = named.map((c) => `${counts[c]} ${now.columns[c]}`).join(", ");
      return el("div", { class: "bar" }, el("span", {}, `${model} `, el("small", {}, `of ${among.length}`)),
        el("div", {}, ...parts), el("p", { "aria-hidden": "true" }, all)); // the names of the parts, on a phone
    });
    const key = [["right", "as labelled"], ["same", `as ${now.models[state.model]}`], ["", "another answer"]];
    bars.replaceChildren(...cell.length && now.models.length > 1 ? [
      el("p", {}, "What the others say of them. Choose a part to see its images alone, again for all."
        + (state.also.size ? " A bar with a chosen part counts the images without that choice." : "")), ...lines,
      el("p", { class: "key" }, ...key.slice(state.row === state.col ? 2 : 0).map(([kind, text]) =>
        el("span", {}, el("span", { class: `swatch ${kind}` }), text))),
    ] : []);
  }
  function append(focus) {
    const cards = found.slice(shown, shown + PAGE).map((i, k) => card(i, shown + k));
    shown += cards.length;
    list.append(...cards);
    more.hidden = shown >= found.length;
    more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more of ${found.length}`;
    if (focus && cards.length) {
      cards[0].tabIndex = -1;
      cards[0].focus();
    }
  }
  function card(i, place, longest = 80) {
    const now = set();
    const [width, height] = now.size[i], scale = longest / now.side;
    const tile = i % data.tiles;
    const x = (tile % data.across) * now.side, y = Math.floor(tile / data.across) * now.side;
    const thumb = width
      ? el("div", {
        role: "img", "aria-label": `picture ${now.id[i]}`, class: `thumb s${state.set}_${Math.floor(i / data.tiles)}`,
        style: `width:${width}px;height:${height}px;background-position:-${x}px -${y}px;zoom:${scale}`,
      })
      : el("div", { class: "thumb lost" }, "picture cannot be read");
    const label = number(now.label, i), noise = number(now.drawn, i), drawn = noise >= 0; // mislabelled on purpose
    const answers = now.models.map((model, m) => {
      if (answer(m, i) < 0) return ""; // it was not asked
      const right = answer(m, i) === label, fits = answer(m, i) === noise, percent = number(now.sure[m], i);
      const word = right ? "right" : fits ? "right of a mislabelled picture" : "wrong";
      const seeds = now.of[m] > 1 ? `, same answer in ${now.alike[m][i]} of ${now.of[m]} seeds` : "";
      return el("li", { class: m === state.model ? "this" : null },
        el("span", { class: right || fits ? "right" : "wrong", role: "img", "aria-label": word, title: word },
          right ? "✓" : fits ? "(✓)" : "✗"), ` ${model}: `, el("b", {}, now.columns[answer(m, i)]),
        percent < 0 ? "" : ` ${percent} %`, seeds, fits ? ": right as drawn, not as labelled" : "");
    });
    const reasons = now.text.map((texts, m) => (texts[i] ? el("details", { open: longest > 80 && "" },
      el("summary", {}, `${now.models[m]} says`), el("p", {}, texts[i]),
      ...(now.judged[m] ? [el("p", {}, now.judged[m])] : [])) : ""));
    const kind = now.kinds[number(now.kind, i)];
    const frame = longest > 80 || !width ? el("div", { class: "frame" }, thumb)
      : press(thumb, () => enlarge(place), { class: "frame", "aria-label": `${now.id[i]}: large`, title: "large" });
    return el("li", { class: "card" }, frame,
      el("div", { class: "facts" }, el("code", {}, now.id[i]), el("p", {}, drawn ? "label: " : "true: ",
        el("b", {}, now.labels[label]), drawn ? `, noise on purpose: drawn as ${now.labels[noise]}` : ""),
        ...(now.caption[i] ? [el("p", { class: "caption" }, now.caption[i])] : []),
        ...(kind ? [el("p", {}, `emotion shows in: ${kind}`)] : []),
        el("ul", { role: "list", class: "answers" }, ...answers), ...reasons, ...(state.review ? [verdict(i)] : [])));
  }
  function enlarge(place) {
    if (found[place] === undefined) return;
    at = place;
    count.textContent = `${at + 1} of ${found.length}`;
    large.replaceChildren(card(found[at], at, Math.min(480, innerWidth - 60, innerHeight - 120)));
    if (!dialog.open) dialog.showModal();
  }

  // ---- the view as a link and as a table
  function link() {
    const now = set();
    const about = new URLSearchParams({ explorer: now.name, matrix: now.models[state.model] });
    if (state.filter) about.set("images", now.filters[state.filter]);
    if (state.percent) about.set("show", "percent");
    if (state.shows === "cell") {
      about.set("true", now.labels[state.row]);
      about.set("answer", now.columns[state.col]);
    } else if (state.shows) about.set("sample", "");
    state.also.forEach((c, m) => { about.append("model", now.models[m]); about.append("says", now.columns[c]); });
    return `#${about}`;
  }
  function follow() { // the address is that of the view, from the first choice on
    if (!ready || inLab) return;
    try {
      history.replaceState(history.state, "", link());
    } catch { /* a frame without an address */ }
  }
  function fileName() {
    const now = set(), cell = state.shows === "cell";
    const also = [...state.also].map(([m, c]) => `${now.models[m]}_${now.columns[c]}`);
    const parts = [now.name, ...(state.filter ? [now.filters[state.filter]] : []), ...(cell ? ["true",
      now.labels[state.row], now.models[state.model], now.columns[state.col], ...also] : ["random_sample"])];
    return parts.join("_").replace(/[^\p{L}\p{N}.-]+/gu, "_").slice(0, 120);
  }
  function reopen() {
    const about = new URLSearchParams(location.hash.slice(1));
    const s = data.sets.findIndex((one) => one.name === about.get("explorer"));
    if (s < 0) return;
    const now = data.sets[s], model = now.models.indexOf(about.get("matrix"));
    const row = now.labels.indexOf(about.get("true")), col = now.columns.indexOf(about.get("answer"));
    const says = about.getAll("says").map((name) => now.columns.indexOf(name));
    const also = about.getAll("model").map((name, k) => [now.models.indexOf(name), says[k]]);
    Object.assign(state, {
      set: s, model: model < 0 ? now.models.length - 1 : model, percent: about.has("show"), row: Math.max(0, row),
      col: Math.max(0, col), filter: Math.max(0, now.filters.indexOf(about.get("images"))),
      shows: about.has("sample") ? "sample" : row < 0 || col < 0 ? "" : "cell",
      also: new Map(also.filter(([m, c]) => m >= 0 && c >= 0)),
    });
    drawControls();
    drawGrid();
    host.scrollIntoView();
  }
  function csv(rows) {
    const now = set();
    // quoted; a text that a spreadsheet would take for a formula begins with an apostrophe
    const cell = (value) => `"${String(value).replace(/^(?=[=+\-@\t\r])/, "'").replaceAll('"', '""')}"`;
    const telling = [...now.models.keys()].filter((m) => Object.keys(now.text[m]).length);
    const head = ["dataset", "image_id", "label", "drawn_as", "evidence", "review",
      ...now.models.flatMap((model) => [model, `${model}, %`]), "caption",
      ...telling.map((m) => `${now.models[m]} says`)];
    const lines = rows.map((i) => {
      const noise = number(now.drawn, i), marked = marks[key(i)];
      return [now.name, now.id[i], now.labels[number(now.label, i)], now.labels[noise] || "",
        now.kinds[number(now.kind, i)] || "", marked ? [marked.mark, ...marked.also_right].join(": ") : "",
        ...now.models.flatMap((_, m) =>
          [now.columns[answer(m, i)] ?? "", number(now.sure[m], i) < 0 ? "" : number(now.sure[m], i)]),
        now.caption[i] || "", ...telling.map((m) => now.text[m][i] || "")];
    });
    return `\ufeff${[head, ...lines].map((line) => line.map(cell).join(",")).join("\r\n")}\r\n`;
  }
  function save(name, type, text) {
    const address = URL.createObjectURL(new Blob([text], { type }));
    el("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 9999);
  }

  // ---- labels under review; kept by the browser where it keeps anything
  const place = `emonb-review ${host.dataset.emonb}`;
  let marks = {};
  function stored() {
    try {
      return JSON.parse(localStorage.getItem(place)) || marks;
    } catch {
      return marks;
    }
  }
  marks = stored();
  const key = (i) => JSON.stringify([set().name, set().id[i]]);
  function verdict(i) {
    const now = set(), marked = marks[key(i)], label = number(now.label, i);
    // who reviews the sample looks at each of its pictures anew
    const seen = marked && (state.shows !== "sample" || marked.view === SAMPLE) ? marked : null;
    const view = marked?.view === SAMPLE || state.shows === "sample" ? SAMPLE
      : `${state.row === state.col ? "hits" : "errors"} of ${now.models[state.model]}`;
    const turn = (mark, also_right) => {
      marks = stored();
      if (mark) {
        const about = { dataset: now.name, image_id: now.id[i], label: now.labels[label], mark, also_right, view };
        marks[key(i)] = about;
      } else delete marks[key(i)];
      try {
        localStorage.setItem(place, JSON.stringify(marks));
      } catch { /* this page keeps them */ }
      const chosen = root.activeElement.textContent;
      root.querySelectorAll(`[data-verdict="${i}"]`).forEach((old) => {
        const fresh = verdict(i), focused = old.contains(root.activeElement);
        old.replaceWith(fresh);
        if (focused) [...fresh.children].find((button) => button.textContent === chosen)?.focus();
      });
      drawDesk();
    };
    const also = seen?.also_right || [];
    const toggle = (name) => (also.includes(name) ? also.filter((one) => one !== name) : [...also, name]);
    const said = [...new Set(now.models.map((_, m) => answer(m, i)))].filter((c) => c !== label && c < now.labels.length);
    const plain = ["label is right", "mislabelled"].map((mark) =>
      press(mark, () => turn(seen?.mark === mark ? "" : mark, []), { "aria-pressed": seen?.mark === mark }));
    const others = said.sort((a, b) => a - b).map((c) => press(`also right: ${now.labels[c]}`, () => {
      const names = toggle(now.labels[c]);
      turn(names.length ? "also right" : "", names);
    }, { "aria-pressed": also.includes(now.labels[c]) }));
    return el("div", { class: "marks", role: "group", "aria-label": `review of ${now.id[i]}`, "data-verdict": i },
      plain[0], ...others, plain[1]);
  }
  function drawDesk() {
    desk.hidden = !state.review;
    const counts = {}, pictures = Object.values(marks);
    pictures.forEach(({ view }) => { counts[view] = (counts[view] || 0) + 1; });
    const views = Object.entries(counts).map(([view, n]) => `${n} ${view}`).join(", ");
    const file = JSON.stringify({ emonb_review: 1, pictures }, null, 1);
    desk.replaceChildren(
      el("p", {}, el("b", {}, `${images(pictures.length)} reviewed${views && `: ${views}`}. `), "Mark each picture that "
        + "you look at, also those whose label is right. Who reviews errors alone can only help the model that made them: "
        + "begin with the random sample."),
      el("p", { class: "tools" }, press("Review a random sample", () => { state.also.clear(); sample(); }),
        press("Save the review (JSON)", () => save("emonb-review.json", "application/json", file))));
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
  ready = true;
  addEventListener("hashchange", reopen);
  if (document.readyState === "complete") reopen();
  else addEventListener("load", reopen);
})();
