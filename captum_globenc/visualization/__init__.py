"""How attributions look: in terminals, as pages, as figures, in Captum's records."""

from captum_globenc.visualization.comparison import method_comparison
from captum_globenc.visualization.flow import evidence_flow, rollout_flow
from captum_globenc.visualization.maps import layer_map, source_matrix
from captum_globenc.visualization.record import text_record
from captum_globenc.visualization.report import to_html
from captum_globenc.visualization.strip import token_strip
from captum_globenc.visualization.terminal import to_terminal
from captum_globenc.visualization.text import visible

__all__ = [
    "evidence_flow",
    "layer_map",
    "method_comparison",
    "rollout_flow",
    "source_matrix",
    "text_record",
    "to_html",
    "to_terminal",
    "token_strip",
    "visible",
]
