"""Data of other libraries: Hugging Face's datasets, Parquet, and Grain by the docs."""

import re
from pathlib import Path

import pytest
from flax import nnx

import jaxbnb
from jaxbnb.data import DataError
from jaxbnb.finetune import Encoder, load_dataset
from tests.finetune import toy

pytestmark = pytest.mark.peers
pytest.importorskip("tokenizers")

PAGE = Path(__file__).parents[2] / "docs" / "finetune.md"
ROWS = [
    {"text": "a", "messages": [{"role": "user", "content": "b"}]},
    {"text": "c", "messages": None},
]


@pytest.mark.filterwarnings("default")
def test_datasets_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list(ROWS)
    for source in (split, split.to_iterable_dataset()):
        dataset = load_dataset(source)
        assert list(dataset) == ROWS
        assert dataset.describe(1) == "row 1"
    with pytest.raises(TypeError, match="give one split"):
        load_dataset(datasets.DatasetDict({"train": split}))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    dataset = load_dataset(path)
    assert list(dataset) == ROWS
    assert dataset.describe(1) == f"{path}, row 1"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a sound Parquet file"):
        load_dataset(path)


@pytest.mark.filterwarnings("default")
def test_grain(tmp_path):
    """The code in the docs, on shorter rows."""
    pytest.importorskip("grain")
    (code,) = re.findall(r"```python\n(import grain\n.*?)```", PAGE.read_text(), re.S)
    last = "jaxbnb.finetune.fit(model, tx, batches)"
    assert last in code
    assert "length=512" in code
    code = code.replace(last, f"result = {last}").replace("length=512", "length=16")
    toy.write_folder(tmp_path)
    model = jaxbnb.load_pretrained(tmp_path)
    config = jaxbnb.lora.LoraConfig(r=2, target_modules=["q_proj"])
    jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(0))
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(16)]
    names = {
        "jaxbnb": jaxbnb,
        "model": model,
        "tx": jaxbnb.adamw8bit(1e-2),
        "dataset": load_dataset(rows),
        "encoder": Encoder(jaxbnb.convert.load_tokenizer(tmp_path)),
    }
    exec(code, names)
    assert len(names["result"].losses) == 2
