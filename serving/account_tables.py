"""The tables of users, keys, grants, usage and the audit, as one component of the database."""

import sqlalchemy as sa

from registry.database import Component

_TABLES = sa.MetaData()

USERS = sa.Table(
    "users",
    _TABLES,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),  # seconds since 1970, as everywhere
    sa.Column("queued_jobs", sa.BigInteger),  # quotas; NULL: without a limit
    sa.Column("rows_per_day", sa.BigInteger),
    sa.Column("bytes", sa.BigInteger),
    sa.Column("requests_per_s", sa.Float),
    sa.Column("concurrent_shards", sa.BigInteger),
)

KEYS = sa.Table(
    "api_keys",
    _TABLES,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("user_name", sa.String(64), nullable=False, index=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),  # NULL: until it is rotated or revoked
)

RESTRICTED = sa.Table(
    "restricted_models", _TABLES, sa.Column("model", sa.String(255), primary_key=True)
)

GRANTS = sa.Table(
    "model_grants",
    _TABLES,
    sa.Column("user_name", sa.String(64), primary_key=True),
    sa.Column("model", sa.String(255), primary_key=True),
)

INPUTS = sa.Table(
    "allowed_inputs",
    _TABLES,
    sa.Column("user_name", sa.String(64), primary_key=True),
    sa.Column("prefix", sa.String(512), primary_key=True),
)

USAGE = sa.Table(
    "usage_by_day",
    _TABLES,
    sa.Column("user_name", sa.String(64), primary_key=True),
    sa.Column("day", sa.Integer, primary_key=True),  # whole days since 1970, UTC
    sa.Column("row_count", sa.BigInteger, nullable=False),
)

AUDIT = sa.Table(
    "audit",
    _TABLES,
    sa.Column(
        "sequence",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),  # SQLite counts up INTEGER alone
        primary_key=True,
        autoincrement=True,
    ),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("who", sa.String(255), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("subject", sa.String(255), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
)

COMPONENT = Component("accounts", _TABLES)
