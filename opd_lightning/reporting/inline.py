"""Pictures: matplotlib figures that notebooks show with any backend, or none."""

from io import BytesIO

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that is its own PNG."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()
