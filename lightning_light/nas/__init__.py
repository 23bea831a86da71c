"""Search for an assignment of widths, ranks, operators, depth and int8 under several budgets at once."""

from lightning_light.nas.architecture_search import ArchitectureSearch
from lightning_light.nas.block_choices import BlockChoices
from lightning_light.nas.channel_choices import ChannelChoices
from lightning_light.nas.choices import Change, Choices, Item
from lightning_light.nas.evaluation import Score
from lightning_light.nas.functional import search
from lightning_light.nas.operator_choices import OperatorChoices
from lightning_light.nas.options import SearchOptions
from lightning_light.nas.rank_choices import RankChoices
from lightning_light.nas.result import SearchResult
from lightning_light.nas.table import SearchTable

__all__ = [
    "ArchitectureSearch",
    "BlockChoices",
    "Change",
    "ChannelChoices",
    "Choices",
    "Item",
    "OperatorChoices",
    "RankChoices",
    "Score",
    "SearchOptions",
    "SearchResult",
    "SearchTable",
    "search",
]
