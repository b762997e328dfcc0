"""The tables of the component `models`: what of a model is kept in the database, and in what form.

A version's row never changes but in its state, its description and its tags. Numbers are never used
again, as the rows of deleted versions stay. An alias has one row, which is what it points to now,
and one row more in `model_alias_moves` for each move that it ever made.
"""

import json
from typing import Any, Final

import sqlalchemy as sa

from registry.database import Component

READY: Final = "ready"
DELETED: Final = "deleted"

WRITING: Final = "writing"
GARBAGE: Final = "garbage"


class Json(sa.TypeDecorator[Any]):
    """Plain values as JSON text; the same on both databases, NaN and infinity included."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str:
        """To the database."""
        return json.dumps(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        """From the database."""
        return json.loads(value)


_tables = sa.MetaData()

MODELS = sa.Table(
    "models",
    _tables,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("created_at", sa.Double, nullable=False),
)

VERSIONS = sa.Table(
    "model_versions",
    _tables,
    sa.Column("name", sa.ForeignKey("models.name"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("manifest_sha256", sa.String(64), nullable=False),
    sa.Column("artifact", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("tags", Json, nullable=False),
    sa.Column("lineage", Json, nullable=False),
    sa.Column("metrics", Json, nullable=False),
    sa.Column("parent", sa.Integer),
    sa.Column("key", sa.String(200)),
    sa.UniqueConstraint("name", "key"),
)

ALIASES = sa.Table(
    "model_aliases",
    _tables,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("alias", sa.String(100), primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["name", "number"], ["model_versions.name", "model_versions.number"]),
)

MOVES = sa.Table(
    "model_alias_moves",
    _tables,
    sa.Column("name", sa.ForeignKey("models.name"), primary_key=True),
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("alias", sa.String(100), nullable=False),
    sa.Column("from_number", sa.Integer),
    sa.Column("to_number", sa.Integer),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
)

FOLDERS = sa.Table(  # of artifacts that are not yet, or no longer, those of a version
    "model_folders",
    _tables,
    sa.Column("place", sa.String(1000), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)

COMPONENT = Component("models", _tables)
