"""The names of a trial's arms. They are MLflow's aliases of the arms' versions, too."""

from __future__ import annotations

from typing import Final

CHAMPION: Final = "champion"
SFT: Final = "challenger-sft"
DPO: Final = "challenger-dpo"
ANCHOR: Final = "anchor"
