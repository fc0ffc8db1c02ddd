"""Labels of metrics: few in number for ever, and saying nothing about a tenant.

Every label value is a time series that Prometheus keeps, so a process names at most
`MOST_ADAPTERS` adapters while it lives: the first that it meets. The rest share one label.
"""

from typing import Final

#: The most adapters with a label of their own, per process.
MOST_ADAPTERS: Final = 200
#: What all other adapters are counted under.
OTHER: Final = "other"


def adapter_label(adapter_version_id: int) -> str:
    """The id of the version, not its name: a name is its tenant's affair. 0 is the base model."""
    return str(adapter_version_id) if adapter_version_id else "base"


class BoundedLabels:
    """Gives adapter versions their labels, the first `most` of them one of their own."""

    def __init__(self, most: int = MOST_ADAPTERS) -> None:
        self._most = most
        self._labels: dict[int, str] = {}

    def of(self, adapter_version_id: int) -> str:
        """The label of a version; the same for as long as the process lives."""
        label = self._labels.get(adapter_version_id)
        if label is None:
            if len(self._labels) >= self._most:
                return OTHER
            label = self._labels[adapter_version_id] = adapter_label(adapter_version_id)
        return label
