"""Does anybody lose by taking part? Each site's gain by the released model beside that by a model of its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from tat_core.checkpoint import replacing

log = logging.getLogger("fed_tat.server")


def write_comparison(folder: Path, together_db: Mapping[str, float], alone_db: Mapping[str, float]) -> None:
    """Write ``alone.json``, and warn of every site that is better off alone.

    Parameters
    ----------
    folder : Path
        The run's.
    together_db, alone_db : mapping of site name to float
        Mean gain in PSNR over the input on the site's validation patients; a site that lacks one is left out.
    """
    sites = {
        name: {
            "together_gain_db": together_db[name],
            "alone_gain_db": alone_db[name],
            "difference_db": together_db[name] - alone_db[name],
        }
        for name in sorted(set(together_db) & set(alone_db))
    }
    with replacing(folder / "alone.json") as temporary:
        temporary.write_text(json.dumps({"sites": sites}, indent=1))
    for name, facts in sites.items():
        level = logging.WARNING if facts["difference_db"] < 0 else logging.INFO
        log.log(level, "%s: together %+.2f dB against alone", name, facts["difference_db"])
