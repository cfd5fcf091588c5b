"""A Hugging Face tokenizer behind the engine's interface."""

from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from protocols.errors import ConfigError, InvalidRequest
from tests.tiny_model import END, save_tokenizer, tiny_tokenizer
from worker.engines.base import Turn
from worker.engines.hf_tokenizer import HFTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, tiny_tokenizer())
    return HFTokenizer(directory)


def spelled(tokenizer: HFTokenizer, text: str) -> bytes:
    return b"".join(tokenizer.token_bytes(one) for one in tokenizer.encode(text))


@given(text=st.text())
def test_token_bytes_spell_the_text(tokenizer: HFTokenizer, text: str) -> None:
    assert spelled(tokenizer, text) == text.encode()


def test_a_part_of_a_character_has_its_own_bytes(tokenizer: HFTokenizer) -> None:
    ids = tokenizer.encode("雨")
    assert [tokenizer.token_bytes(one) for one in ids] == [bytes([b]) for b in "雨".encode()]
    assert tokenizer.decode(ids[:2], skip_special_tokens=False) == "\ufffd"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "雨"


def test_a_special_token_has_its_literal_text(tokenizer: HFTokenizer) -> None:
    (end,) = tokenizer.encode(END)
    assert tokenizer.stop_ids == {end}
    assert tokenizer.token_bytes(end) == END.encode()
    assert tokenizer.decode([*tokenizer.encode("rain"), end], skip_special_tokens=True) == "rain"
    assert tokenizer.decode([end], skip_special_tokens=False) == END


def test_no_token_is_longer_than_the_longest(tokenizer: HFTokenizer) -> None:
    lengths = [len(tokenizer.token_bytes(one)) for one in range(1000)]
    assert max(lengths) == tokenizer.longest_token_bytes
    assert tokenizer.token_bytes(999) == b""


def test_a_conversation_is_rendered_up_to_where_the_assistant_speaks(
    tokenizer: HFTokenizer,
) -> None:
    turns = [Turn(role="system", content="be brief"), Turn(role="user", content="the rain")]
    text = tokenizer.decode(tokenizer.render(turns), skip_special_tokens=False)
    assert text == f"system: be brief{END}user: the rain{END}assistant: "


def test_a_conversation_that_the_template_refuses_is_the_jobs_fault(tokenizer: HFTokenizer) -> None:
    turns = [Turn(role="user", content="a"), Turn(role="system", content="b")]
    with pytest.raises(InvalidRequest, match="system message must come first") as caught:
        tokenizer.render(turns)
    assert caught.value.param == "messages"


def test_a_model_without_a_template_takes_no_messages(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, tiny_tokenizer(), chat_template=None)
    with pytest.raises(InvalidRequest, match="no chat template"):
        HFTokenizer(tmp_path).render([Turn(role="user", content="a")])


def test_sentence_pieces_and_lone_bytes_are_spelled(tmp_path: Path) -> None:
    vocabulary = {END: 0, "<unk>": 1, "▁the": 2, "▁rain": 3, "a": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    cast("Any", made).add_special_tokens([END])
    save_tokenizer(tmp_path, made)
    tokenizer = HFTokenizer(tmp_path)
    assert tokenizer.token_bytes(2) == b" the"
    assert tokenizer.token_bytes(5 + 0xE9) == b"\xe9"
    assert tokenizer.token_bytes(0) == END.encode()
    assert tokenizer.longest_token_bytes == len(END)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        HFTokenizer(tmp_path)
