"""Which group a parameter belongs to: a pure function of its name."""

from __future__ import annotations

import re

GROUPS = ("backbone", "hypernetwork", "adapter")
TASK_CODE = "tren.task.weight"

_BLOCK = r"(?:(?:encoder|decoder)[1-3]|latent|refinement)\.\d+\."
_PATTERNS = (
    (r"tren\.(?:entry|residual\.\d+\.(?:first|second)|trunk\.\d+)\.(?:weight|bias)", "hypernetwork"),
    (r"tren\.(?:mlp\.\d+|(?:attention|feed_forward)\.(?:level[1-3]|latent))\.weight", "hypernetwork"),
    (re.escape(TASK_CODE), "adapter"),
    (_BLOCK + r"(?:attention|feed_forward)_norm\.(?:weight|bias)", "adapter"),
    (_BLOCK + r"(?:attention|feed_forward)\.depthwise\.gate", "adapter"),
    (_BLOCK + r"attention\.temperature\.weight", "adapter"),
    (r"output\.weight", "adapter"),
    (_BLOCK + r"(?:attention\.qkv|feed_forward\.expand|(?:attention|feed_forward)\.(?:depthwise|project))\.weight", "backbone"),
    (r"(?:embed|down[1-3]|up[1-3]|merge[23]|fuse|fuse_mix)\.weight", "backbone"),
)


def group_of(name: str) -> str:
    """Name the group of a parameter of `tat_core.model.tat.TAT`.

    Parameters
    ----------
    name : str
        As in ``named_parameters()``.

    Returns
    -------
    str
        ``"backbone"`` (shared by all tasks), ``"hypernetwork"`` (TREN) or ``"adapter"`` (norm affines, kernel gates,
        temperatures and the output convolution: what may be averaged within a task alone).

    Raises
    ------
    ValueError
        The name is none of TAT's.
    """
    for pattern, group in _PATTERNS:
        if re.fullmatch(pattern, name):
            return group
    raise ValueError(f"group_of: expected a parameter name of TAT, got {name!r}; add a pattern for it in tat_core/groups.py")
