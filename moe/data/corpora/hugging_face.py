"""Data sets of the Hugging Face library `datasets`, from its hub or a folder, as a corpus."""

from collections.abc import Iterator
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import gin

from moe.data.corpora.corpus import Document, hashed_hold_out
from moe.data.corpora.files import checked_text
from moe.data.corpora.walk import NULL, LeftOut, left_out_lines, nearest_path
from moe.errors import UserError, first_line, nearest


@gin.configurable
@dataclasses.dataclass(frozen=True)
class HuggingFaceDataset:
    """Each row with text in `column` is a document. Needs the extra `datasets`.

    The library downloads and converts a data set once into its own cache (`$HF_HOME`), and
    memory-maps it from there. Rows whose column is null are left out.

    Attributes:
        path: a name on the hub (`owner/name`), a folder of data files, or one that `save_to_disk`
            wrote. A folder that exists is taken before the hub.
        split: such as "train" or "train[:10%]"; of what `save_to_disk` wrote, a whole split.
        column: where the text is.
        subset: which, of a data set that has several, such as "en".
        revision: a commit of the hub; without one the text may change from one start to the next.
    """

    path: str
    split: str = "train"
    column: str = "text"
    subset: str | None = None
    revision: str | None = None
    _left_out: LeftOut = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    holds_out = staticmethod(hashed_hold_out)

    @property
    def name(self) -> str:
        """The name on the hub, or that of the folder alone; with the subset, if one is given."""
        folder = Path(os.path.expanduser(self.path))
        name = folder.resolve().name if folder.exists() else self.path
        return name if self.subset is None else f"{name}:{self.subset}"

    def documents(self) -> Iterator[Document]:
        """The documents in the order of the rows, named by split and row.

        Raises:
            UserError: `datasets` is not installed, or finds no such data set, split or column, or
                can't read it.
        """
        self._left_out.clear()
        for row, value in enumerate(self._values()):
            where = f"{self.path}: row {row} of {self.split}"
            if value is None:
                self._left_out.setdefault(NULL, []).append(where)
            else:
                text = checked_text(value, f"{where}: column {self.column!r}")
                yield Document(f"{self.split}:{row}", text)

    def left_out(self) -> list[str]:
        """A line on the rows with null at the last reading, if there were any."""
        return left_out_lines(self._left_out)

    def _values(self) -> Iterator[Any]:
        """The column's values, read in batches of rows."""
        columns = self._rows.column_names
        if self.column not in columns:
            hint = nearest(self.column, columns) or f"; it has {', '.join(columns)}"
            raise UserError(f"{self.path}: no column {self.column!r}{hint}")
        try:
            for batch in self._rows.select_columns([self.column]).iter(batch_size=1000):
                yield from batch[self.column]
        except Exception as error:  # errors of Arrow, of files, of decoding
            raise self._unreadable(error) from error

    @functools.cached_property
    def _rows(self) -> Any:
        """The split as a `datasets.Dataset`; cached, so that a command sees a single version."""
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                "HuggingFaceDataset needs a package: pip install 'moe-routing[datasets]'"
            ) from None
        folder = Path(os.path.expanduser(self.path))
        try:
            if any((folder / file).exists() for file in ("dataset_dict.json", "state.json")):
                return self._saved(datasets.load_from_disk(str(folder)))
            path = str(folder) if folder.exists() else self.path
            return datasets.load_dataset(
                path, self.subset, split=self.split, revision=self.revision
            )
        except UserError:
            raise
        except Exception as error:  # errors of the library, the hub, Arrow and Python
            raise self._unreadable(error) from error

    def _saved(self, saved: Any) -> Any:
        """The split of a data set, or of a dictionary of them, that `save_to_disk` wrote."""
        splits = saved if isinstance(saved, dict) else {str(saved.split or self.split): saved}
        if self.subset is not None or self.revision is not None:
            raise UserError(f"{self.path} was saved to disk: it has no subset and no revision")
        if self.split not in splits:
            raise UserError(f"{self.path}: no split {self.split!r}; it has {', '.join(splits)}")
        return splits[self.split]

    def _unreadable(self, error: BaseException) -> UserError:
        while error.__cause__ is not None:
            error = error.__cause__
        folder = Path(os.path.expanduser(self.path))
        hint = "" if folder.exists() else nearest_path(folder)
        return UserError(f"the data set {self.path!r} can't be read: {first_line(error)}{hint}")
