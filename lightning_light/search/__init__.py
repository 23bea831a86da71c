"""Search for an assignment of widths, ranks, depth and int8 under several budgets at once.

The module itself can be called: ``lightning_light.search(...)`` is `lightning_light.search.search`.
"""

import sys
import types

from lightning_light.search.architecture_search import ArchitectureSearch
from lightning_light.search.block_choices import BlockChoices
from lightning_light.search.channel_choices import ChannelChoices
from lightning_light.search.choices import Change, Choices, Item
from lightning_light.search.evaluation import Score
from lightning_light.search.functional import search
from lightning_light.search.options import SearchOptions
from lightning_light.search.rank_choices import RankChoices
from lightning_light.search.result import SearchResult
from lightning_light.search.table import SearchTable

__all__ = [
    "ArchitectureSearch",
    "BlockChoices",
    "Change",
    "ChannelChoices",
    "Choices",
    "Item",
    "RankChoices",
    "Score",
    "SearchOptions",
    "SearchResult",
    "SearchTable",
    "search",
]


class _CallableModule(types.ModuleType):
    """Let ``lightning_light.search`` be the subpackage and the function at once."""

    __call__ = staticmethod(search)


sys.modules[__name__].__class__ = _CallableModule
