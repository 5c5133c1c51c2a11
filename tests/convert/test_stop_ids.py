import json

import pytest

from jaxbnb.convert import CheckpointError
from jaxbnb.convert._stop_ids import stop_ids

CONFIG, GENERATION = "config.json", "generation_config.json"


# What transformers 5.24 finds, and where it finds none or an error, the next.
@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, ()),
        ({CONFIG: {}}, ()),
        ({CONFIG: {"eos_token_id": 5}}, (5,)),
        ({CONFIG: {"eos_token_id": [5, 6, 5]}}, (5, 6)),
        ({CONFIG: {"text_config": {"eos_token_id": 7}}}, (7,)),
        ({CONFIG: {"text_config": {}, "decoder": {"eos_token_id": 7}}}, (7,)),
        ({CONFIG: {"eos_token_id": 5, "text_config": {"eos_token_id": 7}}}, (5,)),
        ({CONFIG: {"eos_token_id": None, "text_config": {"eos_token_id": 7}}}, (7,)),
        ({CONFIG: {"eos_token_id": [], "text_config": {"eos_token_id": 7}}}, (7,)),
        ({CONFIG: {"text_config": [7]}}, ()),
        ({GENERATION: {"eos_token_id": [8, 9]}, CONFIG: {"eos_token_id": 5}}, (8, 9)),
        ({GENERATION: {"eos_token_id": 0}, CONFIG: {"eos_token_id": 5}}, (0,)),
        ({GENERATION: {"eos_token_id": []}, CONFIG: {"eos_token_id": 5}}, (5,)),
        ({GENERATION: {"eos_token_id": None}, CONFIG: {"eos_token_id": 5}}, (5,)),
        ({GENERATION: {}, CONFIG: {"text_config": {"eos_token_id": 7}}}, (7,)),
    ],
)
def test_the_first_that_names_a_token(tmp_path, files, want):
    for name, fields in files.items():
        (tmp_path / name).write_text(json.dumps(fields))
    assert stop_ids(tmp_path) == want


@pytest.mark.parametrize("ids", ["5", 5.0, True, -1, 2**31, 10**400, [None], [[5]], {}])
def test_what_is_not_a_token(tmp_path, ids):
    (tmp_path / CONFIG).write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(CheckpointError, match="must be a token or a list of them"):
        stop_ids(tmp_path)
