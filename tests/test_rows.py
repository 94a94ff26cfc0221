"""Rows from disk equal the matrix in memory, whatever the files and the budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from emonb.errors import EmonbError
from emonb.fit import outputs
from emonb.rows import Rows, blocks


def write(folder, sizes, width=5, dtype=torch.float16):
    whole = torch.arange(sum(sizes) * width, dtype=torch.float32).view(-1, width).to(dtype)
    for i, part in enumerate(whole.split(list(sizes))):
        save_file({"pooled": part.contiguous(), "other": torch.zeros(3)}, folder / f"{i}.safetensors")
    return sorted(folder.glob("*.safetensors")), whole


@settings(max_examples=40, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), memory=st.sampled_from([0, 2**20]))
def test_any_rows_in_any_order(tmp_path_factory, data, sizes, memory):
    files, whole = write(tmp_path_factory.mktemp("rows"), sizes)
    rows = Rows(files, "pooled", memory)
    assert (rows.shape, len(rows), rows.dtype) == (tuple(whole.shape), len(whole), torch.float16)
    picked = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=9))
    assert torch.equal(rows[picked], whole[picked])
    assert torch.equal(rows[torch.tensor(picked, dtype=torch.long)], whole[picked])
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    assert torch.equal(rows[start:stop], whole[start:stop])
    assert torch.equal(rows[:], whole)


def test_what_is_too_long_is_not_held(tmp_path, monkeypatch):
    files, whole = write(tmp_path, [64, 64, 3])
    rows = Rows(files, "pooled", memory=100)
    for file in files[1:]:
        file.unlink()  # what was not asked for need not be there
    assert torch.equal(rows[:64], whole[:64])
    with pytest.raises(FileNotFoundError):
        rows[[100]]


def test_damaged_and_different_files_are_named(tmp_path):
    files, _ = write(tmp_path, [2, 2])
    with pytest.raises(EmonbError, match=r"0\.safetensors: cannot read 'tokens'"):
        Rows(files, "tokens")
    save_file({"pooled": torch.zeros(2, 4, dtype=torch.float16)}, files[1])
    with pytest.raises(EmonbError, match="'pooled' differs between files"):
        Rows(files, "pooled")
    files[0].write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    with pytest.raises(EmonbError, match=r"0\.safetensors: cannot read 'pooled'"):
        Rows(files, "pooled")


def test_a_net_sees_all_blocks_in_order(tmp_path):
    class Twice(torch.nn.Module):
        arity = 1

        def forward(self, x):
            assert x.dtype == torch.float32, "stored as float16, used as float32"
            return 2 * x

    files, whole = write(tmp_path, [3000, 3000, 3000], width=2)
    assert torch.equal(outputs(Twice(), (Rows(files, "pooled", 0),)), 2 * whole.float())
    assert [(b.start, b.stop) for b in blocks(5, 2)] == [(0, 2), (2, 4), (4, 5)]
    assert np.concatenate([np.arange(10_000)[b] for b in blocks(10_000)]).tolist() == list(range(10_000))
