"""Lines of OpenAI's batch files: what each must say, and what is answered for it."""

import json
from collections.abc import Sequence
from typing import Any

from serving.batch_rows import RowSource, grouped_text
from serving.errors import BatchError
from serving.line_rows import CUSTOM_ID, parsed_line
from serving.shards import Shard

MAX_LINES = 50_000
MAX_PROBLEMS = 50


class LineProblems(BatchError):
    """A file with lines that OpenAI's batches do not allow.

    Attributes:
        problems: Of the first bad lines: code, message, line and param.
    """

    def __init__(self, problems: Sequence[dict[str, Any]]) -> None:
        first = problems[0]
        super().__init__(first["message"], first["code"], line=first["line"])
        self.problems = tuple(problems)


def check_lines(source: RowSource, cut: Sequence[Shard], model: str, url: str) -> None:
    """Check all lines of a batch file, as OpenAI's service does before it begins.

    Args:
        source: The file.
        cut: Its shards.
        model: What a `model` in a body must name, where there is one.
        url: What `url` of each line must be.

    Raises:
        BatchError: There are too many lines.
        LineProblems: Some are wrong.
    """
    total = sum(shard.rows for shard in cut)
    if total > MAX_LINES:
        raise BatchError(
            f"the file has {total} lines; at most {MAX_LINES} are allowed. Split it, or use "
            "/v1/batches, which has no such limit.",
            "too_many_tasks",
        )
    problems: list[dict[str, Any]] = []
    seen: set[str] = set()
    number = 0
    for shard in cut:
        for texts in grouped_text(source, shard.pieces, MAX_LINES):
            for _, text, starts in texts:
                bounds = [*starts.tolist(), len(text)]
                for begin, end in zip(bounds, bounds[1:], strict=False):
                    number += 1
                    problem = _problem(text[begin:end], seen, model, url)
                    if problem is not None:
                        code, message, param = problem
                        problems.append(
                            {"code": code, "message": message, "line": number, "param": param}
                        )
                    if len(problems) >= MAX_PROBLEMS:
                        raise LineProblems(problems)
    if problems:
        raise LineProblems(problems)


def _problem(
    line: bytes, seen: set[str], model: str, url: str
) -> tuple[str, str, str | None] | None:
    try:
        request = parsed_line(line)
    except (ValueError, RecursionError):
        return "invalid_json_line", "This line is not parseable as valid JSON.", None
    if not isinstance(request, dict):
        return "invalid_json_line", "This line is no JSON object.", None
    name = request.get(CUSTOM_ID)
    if not isinstance(name, str) or not name:
        return "missing_custom_id", "custom_id must be a text that is not empty.", CUSTOM_ID
    if name in seen:
        return "duplicate_custom_id", f"The custom_id {name[:100]!r} stands twice.", CUSTOM_ID
    seen.add(name)
    if request.get("method", "POST") != "POST":
        return "invalid_method", "method must be POST.", "method"
    if request.get("url") != url:
        return "url_mismatch", f"url must be the batch's endpoint, {url!r}.", "url"
    body = request.get("body")
    if not isinstance(body, dict):
        return "invalid_body", "body must be an object.", "body"
    if body.get("model", model) != model:
        return "model_mismatch", f"model must be {model!r}, as of the endpoint.", "body.model"
    return None


def answer_line(batch: str, number: int, custom_id: str | None, prediction: Any) -> str:
    """One line of the output file."""
    request = f"{batch}-{number}"
    response = {
        "status_code": 200,
        "request_id": request,
        "body": {"predictions": [prediction]},
    }
    return json.dumps(
        {"id": request, CUSTOM_ID: custom_id, "response": response, "error": None},
        separators=(",", ":"),
    )


def error_line(batch: str, number: int, custom_id: str | None, code: str, message: str) -> str:
    """One line of the error file."""
    request = f"{batch}-{number}"
    error = {"code": code, "message": message}
    response = {"status_code": 422, "request_id": request, "body": {"error": error}}
    return json.dumps(
        {"id": request, CUSTOM_ID: custom_id, "response": response, "error": error},
        separators=(",", ":"),
    )
