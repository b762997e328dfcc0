"""From raw columns to a row of the pipeline, in Keras layers: what makes a SavedModel whole.

The same arithmetic as `data_pipeline.encoding`, which reads Arrow, built of Keras's lookups and
TextVectorization, so that whoever serves the SavedModel needs neither Arrow nor Lockstep.
"""

import math
from typing import Any

import keras
import tensorflow as tf

from data_pipeline.encoding import DAY_US, PERIODS, Category, Encoding, Text, Timestamp
from data_pipeline.features import InputColumn, InputLayout


def raw_spec(feature: InputColumn) -> tf.TensorSpec:
    """Type and shape of a raw column: numbers, strings, or microseconds since 1970."""
    if feature.encoding is None:
        return tf.TensorSpec((None, *feature.shape), tf.float32, name=feature.name)
    dtype = tf.string if feature.encoding.raw_dtype == "string" else tf.int64
    return tf.TensorSpec((None,), dtype, name=feature.name)


class RawRows:
    """Turns raw columns into rows; a call may stand in a graph.

    Attributes:
        layers: The layers that hold tables; whoever exports a call must track them.
    """

    def __init__(self, layout: InputLayout) -> None:
        self._layout = layout
        self.layers: dict[str, keras.layers.Layer] = {
            name: _layer(encoding)
            for name, encoding in layout.encodings.items()
            if not isinstance(encoding, Timestamp)
        }
        for layer in self.layers.values():
            layer.build((None,))  # only built layers can be exported

    def __call__(self, columns: dict[str, tf.Tensor]) -> tf.Tensor:
        """The rows of raw columns by name: `(rows, *input_shape) float32`."""
        flat = [
            tf.reshape(self._numbers(feature, columns[feature.name]), [-1, feature.size])
            for feature in self._layout.features
        ]
        joined = tf.concat(flat, axis=1) if len(flat) > 1 else flat[0]
        return tf.reshape(joined, [-1, *self._layout.input_shape])

    def _numbers(self, feature: InputColumn, column: tf.Tensor) -> tf.Tensor:
        if isinstance(feature.encoding, Timestamp):
            return _moments(feature.encoding, column)
        if feature.encoding is not None:
            column = self.layers[feature.name](column)
        return tf.cast(column, tf.float32)


def _layer(encoding: Encoding) -> keras.layers.Layer:
    """The Keras layer that gives the indices of a category or of the words of a text."""
    if isinstance(encoding, Text):
        return keras.layers.TextVectorization(
            output_mode="int",
            output_sequence_length=encoding.sequence_length,
            vocabulary=list(encoding.vocabulary or ()),
        )
    if not isinstance(encoding, Category):
        raise TypeError(f"no layer holds the table of {encoding}")
    known: list[Any] = list(encoding.vocabulary or ())
    if encoding.is_text:
        return keras.layers.StringLookup(vocabulary=known, num_oov_indices=1)
    unused = next(number for number in range(-1, -len(known) - 2, -1) if number not in set(known))
    return keras.layers.IntegerLookup(vocabulary=known, num_oov_indices=1, oov_token=unused)


def _moments(encoding: Timestamp, moments: tf.Tensor) -> tf.Tensor:
    """Parts of moments in microseconds since 1970: `(rows, size) float32`."""
    channels = []
    for part, form in encoding.channels:
        value = tf.cast(_part(part, moments), tf.float32)
        if form != "number":
            first, period = PERIODS[part]
            angle = (value - first) * (2 * math.pi / period)
            value = tf.sin(angle) if form == "sine" else tf.cos(angle)
        channels.append(value)
    return tf.stack(channels, axis=1)


def _part(part: str, moments: tf.Tensor) -> tf.Tensor:
    seconds = moments // 1_000_000
    if part == "second":
        return seconds % 60
    if part == "minute":
        return seconds // 60 % 60
    if part == "hour":
        return seconds // 3600 % 24
    days = moments // DAY_US
    if part == "weekday":
        return (days + 3) % 7  # 1970-01-01 was a Thursday
    year, month, day = _date(days)
    if part == "year":
        return year
    if part == "month":
        return month
    if part == "day":
        return day
    return days - _days(year, tf.ones_like(year), tf.ones_like(year)) + 1


def _date(days: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Year, month and day of days since 1970, in the Gregorian calendar.

    Years are counted from March, so that the leap day is the last one: then months begin at
    `(153 m + 2) // 5`, and 400 years hold 146,097 days.
    """
    shifted = days + 719_468  # from 1970-01-01 to 0000-03-01
    era = shifted // 146_097
    day_of_era = shifted - era * 146_097
    year_of_era = (
        day_of_era - day_of_era // 1_460 + day_of_era // 36_524 - day_of_era // 146_096
    ) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month_from_march = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * month_from_march + 2) // 5 + 1
    month = tf.where(month_from_march < 10, month_from_march + 3, month_from_march - 9)
    year = year_of_era + era * 400 + tf.cast(month <= 2, tf.int64)
    return year, month, day


def _days(year: tf.Tensor, month: tf.Tensor, day: tf.Tensor) -> tf.Tensor:
    """Days since 1970 of a date; the inverse of `_date`."""
    year = year - tf.cast(month <= 2, tf.int64)
    era = year // 400
    year_of_era = year - era * 400
    month_from_march = tf.where(month > 2, month - 3, month + 9)
    day_of_year = (153 * month_from_march + 2) // 5 + day - 1
    day_of_era = year_of_era * 365 + year_of_era // 4 - year_of_era // 100 + day_of_year
    return era * 146_097 + day_of_era - 719_468
