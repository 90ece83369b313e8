"""How attributions look: in terminals, as pages, as figures, in Captum's records."""

from captum_globenc.visualization.record import text_record
from captum_globenc.visualization.report import to_html
from captum_globenc.visualization.terminal import to_terminal
from captum_globenc.visualization.text import visible

__all__ = ["text_record", "to_html", "to_terminal", "visible"]
