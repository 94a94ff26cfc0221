"""Tables and lists of files as other people write them: any UTF or Latin-1, any separator, other machines' paths."""

from __future__ import annotations

import gzip
import io
import json
import os
import posixpath
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from emonb.data import ENDINGS, is_leftover
from emonb.errors import EmonbError
from emonb.files import read_text
from emonb.releases.names import clean

_TEXTS = (".csv", ".tsv", ".jsonl", ".ndjson")
LIST_ENDINGS = (*_TEXTS, ".parquet", *(f"{ending}.gz" for ending in _TEXTS))
_COLUMNS = {
    "path": r"path|file( ?(name|path))?|(image|img)( ?(path|file|name|id))?|id",
    "label": r"labels?|emotion|class( name)?|category",
    "split": r"split|subset|set|usage|partition",
}  # what others call them


def read_table(file: Path, **options: Any) -> pd.DataFrame:
    """All columns of a CSV, TSV, JSONL or parquet file as text, an empty one for what is missing.

    The separator is the one of , ; tab | that the first line has most of; `options` are those of `pandas.read_csv`.
    Raises `EmonbError` naming the file and the row.
    """
    ending = Path(file.name.lower().removesuffix(".gz")).suffix
    try:
        if ending == ".parquet":
            plain = [f.name for f in parquet.read_schema(file) if not pa.types.is_nested(f.type)]  # no picture in it
            found = parquet.read_table(file, columns=plain)
            table = found.to_pandas(ignore_metadata=True)  # an index is a column, too
        elif ending in (".jsonl", ".ndjson"):
            lines = re.split(r"[\r\n]+", _text(file).strip())  # other ends of lines may stand in a text
            table = pd.DataFrame(json.loads("[" + ",\n".join(lines) + "]") if any(lines) else [], dtype=object)
        else:
            text = re.sub(r"^sep=.\s+", "", _text(file))  # a line that Excel writes
            if text.lstrip().startswith("<"):
                raise ValueError("it is a web page")
            sep = max(",;\t|", key=text.partition("\n")[0].count)
            with warnings.catch_warnings():  # a row of more columns than the first is told only so
                warnings.simplefilter("error", pd.errors.ParserWarning)
                types = {"sep": sep, "dtype": "str", "keep_default_na": False, "index_col": False} | options
                table = pd.read_csv(io.StringIO(text), skipinitialspace=True, **types)
    except (ValueError, OSError, EOFError, zlib.error, pd.errors.ParserWarning) as error:  # pandas' are ValueErrors
        why = " ".join(str(error).split())
        raise EmonbError(f"{file}: cannot be read as a table ({why}); correct it or get it again") from None
    table.columns = [str(name).strip() for name in table.columns]
    return table.astype(object).where(table.notna(), "").astype("str")


def _text(file: Path) -> str:
    """The text of a file, also of one that gzip has packed."""
    if not file.name.lower().endswith(".gz"):
        return read_text(file, "cp1252")
    content = gzip.decompress(file.read_bytes())
    return content.decode(json.detect_encoding(content))


def read_captions(file: Path) -> dict[str, str]:
    """`caption_key` of a picture -> its first caption, of a table whose head may have other separators (OASIS').

    Raises `EmonbError` for a table without columns of pictures and of captions.
    """
    head, _, rest = read_text(file, "cp1252").partition("\n")
    names = [clean(name) for name in re.split(r"[,;\t|]", head)]
    pictures = sorted((name for name in names if re.fullmatch(_COLUMNS["path"], name)), key="id".__eq__)  # that last
    said = [name for name in names if re.fullmatch(r"captions?|text|description", name)]
    if not (pictures and said):
        raise EmonbError(f"{file}: columns {', '.join(names)}; one must be path or image, another caption")
    sep = max(",;\t|", key=rest.partition("\n")[0].count)
    table = read_table(file, sep=sep, names=names, header=0).rename(columns={pictures[0]: "path", said[0]: "caption"})
    table = table[table["caption"].str.strip() != ""].drop_duplicates("path")
    return dict(zip(table["path"].map(caption_key), table["caption"].str.strip(), strict=True))


def caption_key(path: str) -> str:
    """How a picture is found in a table of captions: by its path or name, in any case, with or without its ending."""
    stem, ending = os.path.splitext(_key(path.strip()))
    return stem if ending in ENDINGS else stem + ending


def find_lists(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """The lists with a path and a label in a folder, else in the folders right below it (Hugging Face).

    And what has the ending of a list and is none, with the reason, for the caller to tell.
    """
    lists, others = list[Path](), dict[Path, str]()
    for pattern in ("*.*", "*/*.*"):
        files = [p for p in sorted(folder.glob(pattern)) if p.name.lower().endswith(LIST_ENDINGS)]
        files = [p for p in files if not any(map(is_leftover, p.relative_to(folder).parts))]
        others |= {p: why for p in files if (why := _no_list(p, lists))}
        lists = lists or [p for p in files if p not in others]
    return lists, others


def _no_list(file: Path, above: Sequence[Path]) -> str:
    """Why a file is no list of pictures; "": it is one."""
    if above:
        return f"{file}: lies deeper than {above[0].name}, which counts"
    if not file.is_file():
        return f"{file}: no regular file; put the list there"
    try:
        _check_columns(read_table(file, nrows=1), file)
    except EmonbError as error:
        return str(error)
    return ""


def _check_columns(table: pd.DataFrame, file: Path) -> None:
    """Raise `EmonbError` for a table that has no row, or no column for the path or the label."""
    if table.empty:
        raise EmonbError(f"{file}: holds no row; complete it or get it again")
    for role in ("path", "label"):
        if not _columns_for(role, table):
            names = ", ".join(table.columns)
            raise EmonbError(f"{file}: no column for the {role} in {names:.200}; name it {role}")


def _columns_for(role: str, table: pd.DataFrame) -> list[str]:
    """The columns that may be what `_COLUMNS` names; pandas calls the second of one name label.1."""
    plain = {name: re.sub(r"\.\d+$", "", clean(name)) for name in table}
    found = [name for name in table if re.fullmatch(_COLUMNS[role], plain[name])]
    if role == "path":  # before bare names, and these before numbers
        found = [name for name in found if plain[name] == role] or found
        found = [name for name in found if not plain[name].endswith("id")] or found
    return found


def listed_rows(file: Path) -> pd.DataFrame:
    """Columns path, label and, where the list has them, split, caption and group, as text without blanks around.

    Raises `EmonbError` where there is no row, path or label, or two columns could be the same and differ.
    """
    table, roles = read_table(file), {}
    _check_columns(table, file)
    for role in _COLUMNS:
        first, *others = _columns_for(role, table) or [""]
        for other in others:
            if (odd := table[table[first].map(clean) != table[other].map(clean)]).size:
                which = f"{first!r} or {other!r} (such as {odd[first].iloc[0]!r:.40} or {odd[other].iloc[0]!r:.40})"
                raise EmonbError(f"{file}: is the {role} in column {which}? Remove one, or rename it")
        roles |= {first: role} if first else {}
    roles |= {name: name for name in ("caption", "group") if name in table}
    return table[[*roles]].rename(columns=roles).apply(lambda column: column.str.strip())


def located(paths: Sequence[str], root: Path) -> list[str]:
    """Where the files of a list are, relative to `root`; "" for one that is not there, and for all outside.

    As written; else with slashes for backslashes, another case, composed accents or an ending; and where none is there
    so, all below another folder or without the folders of another machine, if only one such reading has most of them.
    """
    found = [path if _is_file_below(root, path) else "" for path in paths]
    if all(found):
        return found
    files: dict[str, str] = {}
    for place, _, names in walk(root):
        for name in names:
            path = os.path.relpath(os.path.join(place, name), root)
            for key in {_key(path), _key(os.path.splitext(path)[0])} if _is_file_below(root, path) else ():
                files[key] = "" if key in files else path  # two that differ in case or ending: neither
    keys = [_key(path) for path in paths]
    found = [path or files.get(key, "") for path, key in zip(found, keys, strict=True)]
    if any(found):
        return found
    readings = {}  # what is found -> how
    for key in keys[:5]:
        parts = key.split("/")
        for tail in ("/".join(parts[n:]) for n in range(len(parts))):
            for file in (file for file in files if file.endswith("/" + tail) or file == tail):
                cut, base = len(parts) - tail.count("/") - 1, file.removesuffix(tail)
                there = tuple(files.get(base + "/".join(k.split("/")[cut:]), "") for k in keys)
                readings.setdefault(there, base or ".")
    best = sorted(readings, key=lambda there: there.count(""))
    if len(best) > 1 and best[0].count("") == best[1].count(""):
        ways = " or ".join(readings[there] for there in best[:2])
        what = f"do the list's files, such as {paths[0]!r}, lie in {ways}? Write their whole paths"
        raise EmonbError(f"{root}: {what}")
    return [*best[0]] if best else found


def _key(path: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", path).casefold().replace("\\", "/"))


def _is_file_below(root: Path, path: str) -> bool:
    """Whether a path that a list gives is a file of the release: no folder or pipe, and nothing outside the root."""
    return not os.path.isabs(path) and ".." not in path.split("/") and os.path.isfile(root / path)


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, in order, through links to folders, too, but into each folder once, so that circles end."""
    seen = set[str]()
    for place, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield place, folders, sorted(files)
