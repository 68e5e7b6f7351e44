"""Names of members of containers as relative paths that cannot leave the container."""

from __future__ import annotations

from collections import Counter

from cxr.storage.uri import reject_damaged

MAX_MEMBERS = 2_000_000


class Names:
    """Cleans the names of a container's members and counts what is skipped, by kind."""

    def __init__(self, uri: str) -> None:
        self.skipped = Counter[str]()
        self._uri, self._seen = uri, set[str]()

    def add(self, name: str) -> str | None:
        """The member's path with slashes; None if the name is absolute, leads out of the container or is empty.

        The last member of a name counts, as when the container is unpacked; the others are counted.
        """
        path = name.replace("\\", "/")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if not parts or path.startswith("/") or ".." in parts or parts[0][1:2] == ":" or "\0" in path:
            self.skipped["unsafe name"] += 1
            return None
        # Bytes that are not UTF-8 are spelled out, because an address is text.
        clean = "/".join(parts).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if clean in self._seen:
            self.skipped["repeated name"] += 1
        self._seen.add(clean)
        if len(self._seen) > MAX_MEMBERS:
            reject_damaged(self._uri, f"it has more than {MAX_MEMBERS:,} members")
        return clean
