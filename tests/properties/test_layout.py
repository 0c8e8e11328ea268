"""The quick way and the search by rendering differences give the same tokens and the same loss mask."""

import pytest
from hypothesis import given, settings

from lora_tune.data import tokens
from lora_tune.data.tokens import RowTokenizer
from tests.properties.test_loss_mask import conversations
from tests.tiny import TEMPLATES, tiny_tokenizer


class BySearch(RowTokenizer):
    """Tokenizes without layouts."""

    def _layout(self, conversation):
        return None


@pytest.fixture(scope="module", params=TEMPLATES)
def templated(request):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


@settings(max_examples=30, deadline=None)
@given(conversation=conversations())
def test_both_ways_agree(templated, conversation):
    for train_on in ("assistant", "last_assistant", "all"):
        (quick,) = RowTokenizer(templated, train_on=train_on)([conversation])
        (searched,) = BySearch(templated, train_on=train_on)([conversation])
        if isinstance(searched, Exception):
            assert str(quick) == str(searched)
            continue
        assert quick.ids == searched.ids
        assert quick.runs == searched.runs
        assert quick.roles == searched.roles


def test_most_rows_take_the_quick_way(templated, monkeypatch):
    from lora_tune.data.messages import Conversation, Message
    from tests.tiny import home_rows

    def never(*_):
        raise AssertionError("searched")

    rows = [Conversation(tuple(Message(**m) for m in row["messages"]), 2, "row:1") for row in home_rows(5)]
    tokenizer = RowTokenizer(templated, train_on="assistant")
    tokenizer(rows[:1])
    monkeypatch.setattr(tokens, "written_row", never)
    assert all(not isinstance(found, Exception) for found in tokenizer(rows))
