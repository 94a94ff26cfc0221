"""The README's numbers and picture come from a run."""

import pandas as pd
import pytest
from reporting import make_results

from emonb.clean import refresh_readme
from emonb.errors import EmonbError

HEAD, TAIL = "# Title\n<!-- results: make notebooks writes them -->\n", "<!-- end of results -->\nThe rest.\n"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("results") / "out")


def test_readme_gets_the_runs_numbers_and_picture(out, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(HEAD + "stale figures\n" + TAIL)
    refresh_readme(out, readme)
    text = readme.read_text()
    assert text.startswith(HEAD)
    assert text.endswith(TAIL)
    assert "stale" not in text
    main = pd.read_csv(out / "tables" / "main.csv").query("row == 'emovlmkd'").iloc[0]
    assert f"| EmoVLM-KD | {main['ours']:.1f} [{main['ci_low']:.1f}, {main['ci_high']:.1f}]" in text
    assert "1.5 minutes of computing on 2 cores" in text
    drawn = out / "figures" / "complementarity_venn.png"
    assert (tmp_path / "docs" / "pictures" / "complementarity.png").read_bytes() == drawn.read_bytes()
    refresh_readme(out, readme)
    assert readme.read_text() == text


def test_readme_without_markers_is_left_alone(out, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(EmonbError, match="markers"):
        refresh_readme(out, readme)
    assert readme.read_text() == "# Title\n"
