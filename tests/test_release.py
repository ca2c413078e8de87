"""What a release needs: one version everywhere, and a change log that names it."""

import re
from pathlib import Path

from coaug_trl import __version__


ROOT = Path(__file__).parent.parent


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert 'attr = "coaug_trl.__version__"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_change_log_begins_with_this_version():
    versions = re.findall(
        r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert versions[0] == __version__
