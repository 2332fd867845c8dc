"""Requests made from the OpenAPI page, right and wrong ones: never a failure, and what is refused is said in JSON."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from serving_here import serving

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = 500 if "COLLIE_TEST_ALL" in os.environ else 30  # of each endpoint, right ones and wrong ones


def test_whatever_is_asked_is_answered_or_refused(small: Any) -> None:
    answered: Counter[int] = Counter()

    def look(case: Any) -> None:
        response = case.call(timeout=20)
        answered[response.status_code] += 1
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]

    checks: Any = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    bounds = settings(max_examples=EXAMPLES, derandomize=True, **checks)
    # Answers are short, since they are not looked at.
    with serving(small.model, small.tokenizer, model_name="small", max_new_tokens=3, queue=1000) as one:
        schema = schemathesis.openapi.from_url(f"{one.url}/openapi.json")
        for operation, mode in product(schema.get_all_operations(), schemathesis.GenerationMode):
            with suppress(Unsatisfiable):  # where nothing can be said, nothing wrong can be said
                bounds(given(operation.ok().as_strategy(generation_mode=mode))(look))()
    assert min(answered[200], answered[400]) > EXAMPLES, answered
