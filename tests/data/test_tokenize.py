"""Token ids of strings and chats: boundaries, EOS, scored tokens, truncation; golden ids."""

import array
import dataclasses
import functools
import os
import pathlib
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastpref.data.chat import stop_token_ids
from fastpref.data.files import DataError
from fastpref.data.formats import Example, load_examples, to_examples
from fastpref.data.packing import pack
from fastpref.data.tokenize import Group
from fastpref.data.tokenize import tokenize as compact
from fastpref.data.unpaired import add_mismatched

# id: 0      1     2       3    4         5       6            7        8     9       10
WORDS = ["?", "\n", "\n\n", " ", "system", "user", "assistant", "model", "Be", "kind", "Hi"]
WORDS += ["Yes", "No", "Why", "think", "tool", "a", "4", "add", "INST"]  # 11 to 19


def words(special, template=None, plain=(), **kwargs):
    """A tokenizer of WORDS; special tokens are numbered from 20, plain added tokens after them."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    pieces = Regex(r"\n+|[^\S\n]|\w+|[^\w\s]")
    backend.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    backend.add_special_tokens(list(special))
    backend.add_tokens(list(plain))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **kwargs)


def tokenize(*args, **options):
    """The groups with lists for arrays, which print and compare as one reads them."""
    groups, counts = compact(*args, **options)
    return [
        dataclasses.replace(g, prompt=[*g.prompt], completions=tuple([*c] for c in g.completions))
        for g in groups
    ], counts


def message(role, content):
    return {"role": role, "content": content}


SYSTEM, HI, WHY = message("system", "Be kind"), message("user", "Hi"), message("user", "Why")
YES, NO = message("assistant", "Yes"), message("assistant", "No")


def chat(prompt, *completions, **kwargs):
    return Example(prompt, completions, 0, "data:1", {"margin": 2.0}, **kwargs)


def group(examples, tokenizer, **kwargs):
    (made,), counts = tokenize([examples], tokenizer, **kwargs)
    return made, counts


LLAMA3 = """{{- bos_token -}}
{%- for m in messages -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' ~ (m.content | trim) }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{%- endif -%}"""

QWEN3 = """{%- set spot = namespace(asked=-1) -%}
{%- for m in messages if m.role == 'user' -%}
  {%- set spot.asked = messages.index(m) -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- set said = m.content.split('</think>')[-1].lstrip('\n') -%}
  {%- set thought = '<think>\n\n</think>\n\n' if loop.last and loop.index0 > spot.asked else '' -%}
  {{- '<|im_start|>' ~ m.role ~ '\n' -}}
  {{- thought ~ said if m.role == 'assistant' else m.content -}}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking -}}
{%- endif -%}"""

GEMMA = """{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif -%}
  {{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' -}}
  {{- m.content | trim ~ '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}"""

MISTRAL = """{{- bos_token -}}
{%- for m in messages -%}
  {{- '[INST] ' ~ m.content ~ '[/INST]' if m.role == 'user' else ' ' ~ m.content ~ eos_token -}}
{%- endfor -%}"""

CHATML = """{%- if tools %}{{ '<|im_start|>tool\n' ~ tools[0].name ~ '<|im_end|>\n' }}{% endif -%}
{%- for m in messages -%}
  {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""

MARKED = """{%- for m in messages -%}
  {{- '<|im_start|>' ~ m.role ~ '\n' -}}
  {%- if m.role == 'assistant' -%}
    {%- generation %}{{ m.content if loop.last else m.content.split(' ')[-1] }}<|im_end|>
{% endgeneration -%}
  {%- else %}{{ m.content ~ '<|im_end|>\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""

IM = ("<|im_start|>", "<|im_end|>")  # 20, 21


def llama3():
    marks = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return words(marks, LLAMA3, bos_token=marks[0], eos_token=marks[3])


def qwen3():
    return words((*IM, "<|endoftext|>"), QWEN3, ("<think>", "</think>"), eos_token="<|im_end|>")


def test_llama3_golden():
    made, counts = group(chat([SYSTEM, HI], [YES], [NO]), llama3())
    system = [21, 4, 22, 2, 8, 3, 9, 23]  # <sh> system <eh> \n\n Be _ kind <eot>
    user = [21, 5, 22, 2, 10, 23]
    prompt = [20, *system, *user, 21, 6, 22, 2]
    assert made == Group(prompt, ([11, 23], [12, 23]), (None, None), 0, {"margin": 2.0})
    assert not any(counts.values())


def test_qwen3_golden():
    made, _ = group(chat([HI], [YES], [NO]), qwen3())
    user = [20, 5, 1, 10, 21, 1]  # <im_start> user \n Hi <im_end> \n
    thought = [23, 2, 24, 2]  # <think> \n\n </think> \n\n
    assert made.prompt == [*user, 20, 6, 1]
    # the stop token is scored, the template's newline (1) after it is not there
    assert made.completions == ([*thought, 11, 21], [*thought, 12, 21])
    assert made.scored == (None, None)
    without = {"enable_thinking": False}
    made, _ = group(chat([HI], [YES], [NO], template_kwargs=without), qwen3())
    assert made.prompt == [*user, 20, 6, 1, *thought]
    assert made.completions == ([11, 21], [12, 21])


def test_qwen3_drops_earlier_thoughts():
    thinks = message("assistant", "<think>\nWhy\n</think>\n\nYes")
    made, _ = group(chat([HI, thinks, WHY], [NO]), qwen3())
    user, why = [20, 5, 1, 10, 21, 1], [20, 5, 1, 13, 21, 1]
    assert made.prompt == [*user, 20, 6, 1, 11, 21, 1, *why, 20, 6, 1]
    assert made.completions == ([23, 2, 24, 2, 12, 21],)
    # the first of two replies was asked for with a thought, but the whole shows it without
    with pytest.raises(DataError, match=r"^data:1: turn 1: need a chat template that leaves"):
        tokenize([chat([HI], [YES, WHY, NO])], qwen3())


def test_gemma_golden():
    marks = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>")
    tokenizer = words(marks, GEMMA, bos_token="<bos>", eos_token="<eos>")
    made, _ = group(chat([HI, YES, WHY], [NO], [YES]), tokenizer)
    turns = [21, 5, 1, 10, 22, 1, 21, 7, 1, 11, 22, 1, 21, 5, 1, 13, 22, 1]
    assert made.prompt == [20, *turns, 21, 7, 1]
    assert made.completions == ([12, 22], [11, 22])  # <end_of_turn>; no <eos> on top
    with pytest.raises(DataError, match=r"^data:1: .* got TemplateError: no system role here"):
        tokenize([chat([SYSTEM, HI], [YES], [NO])], tokenizer)


def test_mistral_golden():
    marks = ("<s>", "</s>", "[INST]", "[/INST]")
    tokenizer = words(marks, MISTRAL, bos_token="<s>", eos_token="</s>")
    made, _ = group(chat([HI, YES, WHY], [NO], [YES]), tokenizer)
    assert made.prompt == [20, 22, 3, 10, 23, 3, 11, 21, 22, 3, 13, 23]
    assert made.completions == ([3, 12, 21], [3, 11, 21])  # the space is the reply's, EOS once


def chatml(template=CHATML):
    return words(IM, template, eos_token="<|im_end|>")


def test_only_assistant_turns_are_scored():
    completion = [YES, WHY, NO]
    made, _ = group(chat([HI], completion), llama3())
    between = [21, 5, 22, 2, 13, 23, 21, 6, 22, 2]
    assert made.completions == ([11, 23, *between, 12, 23],)
    assert made.scored == ([True] * 2 + [False] * 10 + [True] * 2,)
    made, _ = group(chat([HI], completion), chatml())
    between = [1, 20, 5, 1, 13, 21, 1, 20, 6, 1]  # the newline after a stop token is not scored
    assert made.completions == ([11, 21, *between, 12, 21],)
    assert made.scored == ([True] * 2 + [False] * 10 + [True] * 2,)


def test_tools_and_tool_turns():
    answer = message("tool", "4")
    made, _ = group(chat([HI], [YES, answer, NO], [NO], tools=[{"name": "add"}]), chatml())
    assert made.prompt == [20, 15, 1, 18, 21, 1, 20, 5, 1, 10, 21, 1, 20, 6, 1]
    assert made.completions[0] == [11, 21, 1, 20, 15, 1, 17, 21, 1, 20, 6, 1, 12, 21]
    assert made.scored == ([True] * 2 + [False] * 10 + [True] * 2, None)


def test_text_after_the_last_reply_is_left_out():
    made, _ = group(chat([HI], [YES, WHY], [NO]), chatml())
    assert (made.completions, made.scored) == (([11, 21], [12, 21]), (None, None))


def test_completion_that_starts_with_a_question():
    made, _ = group(chat([SYSTEM], [HI, YES], [NO]), chatml())
    assert made.prompt == [20, 4, 1, 8, 3, 9, 21, 1]  # no generation prompt
    assert made.completions == ([20, 5, 1, 10, 21, 1, 20, 6, 1, 11, 21], [20, 6, 1, 12, 21])
    assert made.scored == ([False] * 9 + [True] * 2, [False] * 3 + [True] * 2)


def test_generation_marks_decide():
    """MARKED rewrites earlier replies, so that only its marks can say what is scored."""
    long = message("assistant", "a Yes")
    made, _ = group(chat([HI], [long, WHY, NO]), chatml(MARKED))
    assert made.completions == ([11, 21, 1, 20, 5, 1, 13, 21, 1, 20, 6, 1, 12, 21],)
    assert made.scored == ([True] * 2 + [False] * 10 + [True] * 2,)
    plain = MARKED.replace("{%- generation %}", "").replace("{% endgeneration -%}", "")
    with pytest.raises(DataError, match=r"turn 1: .*got 'Yes<\|im_end\|>.* where it had 'a Yes"):
        tokenize([chat([HI], [long, WHY, NO])], chatml(plain))


def test_marks_around_part_of_a_reply():
    part = """{%- for m in messages -%}{{ '<|im_start|>' ~ m.role ~ '\n' }}
    {%- if m.role == 'assistant' -%}a {% generation %}{{ m.content }}{% endgeneration %}<|im_end|>
    {%- else %}{{ m.content ~ '<|im_end|>\n' }}{% endif %}{% endfor -%}
    {%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""
    made, _ = group(chat([HI], [YES]), chatml(part))
    assert (made.completions, made.scored) == (([16, 3, 11],), ([False, False, True],))
    none = part.replace("{{ m.content }}{% end", "{% end")
    with pytest.raises(DataError, match=r"1 groups all dropped \(1 empty, 0 identical\)"):
        tokenize([chat([HI], [YES])], chatml(none))


def test_template_that_rewrites_the_prompt_is_refused():
    for template in (CHATML, MARKED):
        counts = "{{ messages | length }}" + template
        with pytest.raises(DataError, match=r"^data:1: turn 1: .*got '2<\|im.* where it had '1<"):
            tokenize([chat([HI], [YES])], chatml(counts))


def test_a_turn_ends_at_its_first_stop_token():
    """As Phi-3: <|end|> ends a turn, and the tokenizer's EOS the whole text."""
    template = CHATML.replace("<|im_end|>", "<|end|>") + "{% if not add_generation_prompt %}"
    template += "{{ eos_token }}{% endif %}"
    tokenizer = words(("<|im_start|>", "<|end|>", "</s>"), template, eos_token="</s>")
    made, _ = group(chat([HI], [YES]), tokenizer)
    assert made.completions == ([11, 21, 1, 22],)
    config = SimpleNamespace(eos_token_id=[21, 22])
    made, _ = group(chat([HI], [YES, WHY, NO]), tokenizer, generation_config=config)
    assert made.completions == ([11, 21, 1, 20, 5, 1, 13, 21, 1, 20, 6, 1, 12, 21],)
    assert made.scored == ([True] * 2 + [False] * 10 + [True] * 2,)
    with pytest.raises(DataError, match="turn 1: need a chat template that leaves"):
        tokenize([chat([HI], [YES, WHY, NO])], tokenizer)


def test_a_template_without_stop_keeps_its_text():
    made, _ = group(chat([HI], [YES]), chatml(CHATML.replace("<|im_end|>", "")))
    assert made.completions == ([11, 1],)


def test_chat_boundary_that_merges():
    """The reply starts with a newline that would join the header's: it is tokenised apart."""
    with pytest.warns(UserWarning, match=r"^1 of 1 completions were tokenised apart .*data:1"):
        made, counts = group(chat([HI], [message("assistant", "\nYes")]), chatml())
    assert made.prompt[-3:] == [20, 6, 1]
    assert made.completions == ([1, 11, 21],)
    assert counts["boundary_differs"] == 1


def letters(bos=None, post=None, dummy=False, **kwargs):
    """Characters and the merges ab, xy and (at a word's start) _y; a=3 b=4 c=5 x=6 y=7 _=8."""
    names = ["<unk>", "<s>", "</s>", "a", "b", "c", "x", "y", "▁", "ab", "xy", "▁y", "\n"]
    merges = [("a", "b"), ("x", "y"), ("▁", "y")]
    vocab = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    if dummy:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>"])
    if post:
        marks = [("<s>", 1), ("</s>", 2)]
        backend.post_processor = processors.TemplateProcessing(single=post, special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", bos_token=bos, **kwargs
    )


def strings(prompt, *completions, row=0):
    return Example(prompt, completions, row, f"data:{row + 1}")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("post", "start"), [(None, []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", [])]
)
def test_strings_keep_bos_and_end_once(post, start):
    made, _ = group(strings("ca", "cc", "a</s>"), letters("<s>", post))
    assert made == Group([*start, 5, 3], ([5, 5, 2], [3, 2]), (None, None), 0, {})
    made, _ = group(strings("c</s>", "c"), letters("<s>", post))
    assert made.prompt == [*start, 5, 2]  # an EOS that the prompt's text holds stays


def test_strings_that_merge_across_the_boundary():
    examples = [strings("ca", "bc", "c"), strings("c", "abc", "b", row=1)]
    with pytest.warns(UserWarning, match=r"^1 of 4 completions .* \(first: data:1\)") as caught:
        groups, counts = tokenize(examples, letters())
    assert len(caught) == 1
    assert [g.prompt for g in groups] == [[5, 3], [5]]
    assert [g.completions for g in groups] == [([4, 5, 2], [5, 2]), ([9, 5, 2], [4, 2])]
    assert counts["boundary_differs"] == 1


@pytest.mark.filterwarnings("ignore:.*tokenised apart")
def test_dummy_prefix_adds_no_space():
    tokenizer = letters("<s>", "<s> $A", dummy=True)
    assert tokenizer("y")["input_ids"] == [1, 11]  # by itself: a space before it
    made, counts = group(strings("x", "ya", "a"), tokenizer)
    assert made == Group([1, 8, 6], ([7, 3, 2], [3, 2]), (None, None), 0, {})
    assert counts["boundary_differs"] == 1


def test_empty_prompts():
    for post in (None, "<s> $A"):
        made, _ = group(strings("", "cab", "b"), letters("<s>", post))
        assert made == Group([1], ([5, 9, 2], [4, 2]), (None, None), 0, {})
    # no BOS: the first token is context
    made, _ = group(strings("", "cab", "ca"), letters())
    assert made == Group([5], ([9, 2], [3, 2]), (None, None), 0, {})
    with pytest.raises(DataError, match=r"^data:1: need a prompt, or a tokenizer with a BOS token"):
        tokenize([strings("", "cab", "b")], letters())


def test_order_of_strings_and_chats_is_kept():
    tokenizer = chatml()
    mixed = [strings("Hi", " Yes"), chat([HI], [YES]), strings("Hi", " No", row=2)]
    groups, _ = tokenize(mixed, tokenizer)
    assert [g.completions for g in groups] == [([3, 11, 21],), ([11, 21],), ([3, 12, 21],)]
    assert [g.row for g in groups] == [0, 0, 2]


def test_scores_come_to_the_batch():
    row = {"prompt": "c", "completions": ["c", "b", "c"], "scores": [0.5, -1, 2], "margin": 3}
    chats = {"prompt": [HI], "completions": [[NO], [YES]], "scores": [1, 4], "margin": 5}
    pair = {"prompt": "c", "chosen": "b", "rejected": "a", "margin": 6}
    alike = {"prompt": "c", "completions": ["b", "b"], "scores": [0, 1], "margin": 7}
    examples, _ = to_examples([row, pair, alike], "ranking")
    groups, counts = tokenize(examples, letters())
    assert groups[0].completions == ([5, 2], [4, 2], [5, 2])  # two alike, in the order given
    assert counts["dropped_identical"] == 1  # all alike
    batch = pack(groups)
    assert batch.groups.tolist() == [0, 3, 5]
    assert batch.extras["score"].tolist() == [0.5, -1.0, 2.0, 1.0, 0.0]
    assert batch.extras["margin"].tolist() == [3.0, 6.0]
    groups, _ = tokenize(to_examples([chats], "ranking")[0], chatml())
    assert groups[0].completions == ([12, 21], [11, 21])
    assert pack(groups).extras["score"].tolist() == [1.0, 4.0]


def test_labels_come_to_the_batch():
    pair = {"prompt": "c", "chosen": "b", "rejected": "a"}
    rows = [pair, {"prompt": "a", "completion": "c", "label": True}]
    examples, _ = to_examples(rows, "unpaired")
    groups, _ = tokenize(examples, letters())
    assert [(g.prompt, g.completions) for g in groups] == [
        ([5], ([4, 2],)),
        ([5], ([3, 2],)),
        ([3], ([5, 2],)),
    ]
    batch = pack(groups)
    assert batch.extras["label"].tolist() == [1.0, 0.0, 1.0]
    assert batch.extras["row"].tolist() == [0, 0, 1]
    groups, _ = tokenize(add_mismatched(examples), letters())
    assert [g.completions for g in groups] == [
        ([4, 2], [5, 2]),
        ([3, 2], [5, 2]),
        ([5, 2], [3, 2]),
    ]
    assert pack(groups).extras["label"].tolist() == [1.0, 0.0, 1.0]
    chats = [{"prompt": [HI], "completion": [YES], "label": 0}]
    chats += [{"completion": [WHY, NO], "label": 1}]
    groups, _ = tokenize(add_mismatched(to_examples(chats, "unpaired")[0]), chatml())
    assert [g.completions for g in groups] == [([11, 21], [12, 21]), ([12, 21], [11, 21])]
    assert pack(groups).extras["label"].tolist() == [0.0, 1.0]


@functools.cache
def byte_bpe(texts=("ab ab. a b\n\nA é ab", " a. ab\n"), size=280):
    """A byte-level BPE trained on the texts; <s> (0) starts a text, </s> is 1."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    marks = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@given(
    st.lists(
        st.tuples(*[st.text("ab \n.éA", max_size=9)] * 3),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore:.*tokenised apart")
def test_no_text_is_lost(rows):
    tokenizer = byte_bpe()
    examples = [strings(*row, row=i) for i, row in enumerate(rows)]
    try:
        groups, counts = tokenize(examples, tokenizer, max_length=None)
    except DataError as error:
        assert "all dropped" in str(error)  # noqa: PT017 - the one fault these rows can have
        return
    assert len(groups) + counts["dropped_identical"] == len(rows)
    for g in groups:
        assert g.prompt[0] == 0
        for ids, text in zip(g.completions, rows[g.row][1:], strict=True):
            assert tokenizer.decode([*g.prompt[1:], *ids[:-1]]) == rows[g.row][0] + text
            assert ids[-1] == 1


@pytest.mark.parametrize(
    ("mode", "max_length", "prompt", "completions", "counts"),
    [
        # all fits: 4 + (3 + EOS) = 8
        ("keep_start", 8, [5, 4, 4, 4], ([5, 5, 5, 2], [4, 2]), (0, 0)),
        # one short: the prompt gives its first token
        ("keep_start", 7, [4, 4, 4], ([5, 5, 5, 2], [4, 2]), (1, 0)),
        # half is the prompt's: from here the completion gives its end, EOS first
        ("keep_start", 6, [4, 4, 4], ([5, 5, 5], [4, 2]), (1, 1)),
        ("keep_start", 3, [4], ([5, 5], [4, 2]), (1, 1)),
        ("keep_start", 2, [4], ([5], [4]), (1, 2)),
        ("keep_end", 8, [5, 4, 4, 4], ([5, 5, 5, 2], [4, 2]), (0, 0)),
        ("keep_end", 6, [4, 4], ([5, 5, 5, 2], [4, 2]), (1, 0)),
        ("keep_end", 5, [4], ([5, 5, 5, 2], [4, 2]), (1, 0)),
        ("keep_end", 3, [4], ([5, 2], [4, 2]), (1, 1)),
    ],
)
def test_truncation_edges(mode, max_length, prompt, completions, counts):
    example = strings("cbbb", "ccc", "b")
    made, got = group(example, letters(), max_length=max_length, truncation_mode=mode)
    assert (made.prompt, made.completions) == (prompt, completions)
    assert (got["truncated_prompts"], got["truncated_completions"]) == counts


def test_truncation_keeps_bos():
    tokenizer = letters("<s>", "<s> $A")
    made, _ = group(strings("ccbb", "ccc"), tokenizer, max_length=7)
    assert (made.prompt, made.completions) == ([1, 4, 4], ([5, 5, 5, 2],))
    made, _ = group(strings("ccbb", "ccc"), tokenizer, max_length=3)
    assert (made.prompt, made.completions) == ([4], ([5, 5],))


def test_truncation_drops_what_teaches_nothing():
    examples = [
        strings("c", "cca", "ccb"),
        strings("c", "c", "b", row=1),
        strings("c", "cc", row=2),
    ]
    groups, counts = tokenize(examples, letters(), max_length=3)
    assert [g.row for g in groups] == [1, 2]
    assert (counts["dropped_identical"], counts["dropped_empty"]) == (1, 0)
    turned = chat([SYSTEM], [HI, YES], [NO])  # 9 unscored tokens before the first reply
    groups, counts = tokenize([turned, chat([HI], [YES], [NO])], chatml(), max_length=16)
    assert len(groups) == 1 and counts["dropped_empty"] == 1
    assert counts["truncated_completions"] == 1
    with pytest.raises(DataError, match=r"got 1 groups all dropped \(0 empty, 1 identical\)"):
        tokenize([strings("c", "cca", "ccb")], letters(), max_length=3)


def test_truncated_chat_has_no_stop_token():
    made, _ = group(chat([HI], [YES, WHY, NO]), chatml(), max_length=20)
    # 9 of prompt, 14 of completion: the prompt keeps 10, the completion 11
    assert len(made.prompt) == 9
    assert made.completions == ([11, 21, 1, 20, 5, 1, 13, 21, 1, 20, 6],)
    assert made.scored == ([True] * 2 + [False] * 9,)
    made, _ = group(chat([HI], [YES, WHY, NO]), chatml(), max_length=10, truncation_mode="keep_end")
    assert (made.prompt, made.scored) == ([1], ([False] * 7 + [True] * 2,))


@given(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(2, 20))
@settings(max_examples=100, deadline=None)
def test_truncation_never_loses_a_completion(n_prompt, lengths, max_length):
    ends = "abc"[: len(lengths)]  # so that no two are identical before the cut
    texts = [ends[i] + "c" * n for i, n in enumerate(lengths)]
    groups, _ = tokenize([strings("x" * n_prompt, *texts)], letters(), max_length=max_length)
    (g,) = groups
    longest = max(lengths) + 2
    room = max_length - len(g.prompt)
    assert 1 <= len(g.prompt) <= n_prompt
    assert len(g.prompt) >= min(n_prompt, max_length // 2)
    for ids, n in zip(g.completions, lengths, strict=True):
        assert len(ids) == min(n + 2, room)
        assert len(ids) >= min(n + 2, (max_length + 1) // 2)
    if len(g.prompt) < n_prompt:  # nothing is thrown away that had room
        assert len(g.prompt) == max(max_length - longest, max_length // 2)


def test_options_are_checked():
    example = strings("c", "a")
    for options, need in [
        ({"max_length": 1}, "max_length of at least 2"),
        ({"truncation_mode": "middle"}, "truncation_mode keep_start or keep_end, got 'middle'"),
    ]:
        with pytest.raises(ValueError, match=need):
            tokenize([example], letters(), **options)
    with pytest.raises(ValueError, match="need a tokenizer with a chat template"):
        tokenize([chat([HI], [YES])], letters())
    with pytest.raises(ValueError, match="need a tokenizer with an EOS token"):
        tokenize([strings("Hi", "Yes")], words(IM))
    assert tokenize([], letters())[0] == []


def test_stop_token_ids():
    tokenizer = chatml()
    assert stop_token_ids(tokenizer) == {21}
    for ids in (20, [20], None):
        config = SimpleNamespace(eos_token_id=ids)
        assert stop_token_ids(tokenizer, config) == {20, 21} - ({20} if ids is None else set())
    assert stop_token_ids(words(IM)) == set()


def test_harmless():
    if not os.environ.get("FASTPREF_DATA"):
        pytest.skip("FASTPREF_DATA names no folder of real data")
    path = pathlib.Path(os.environ["FASTPREF_DATA"]) / "hh-rlhf" / "harmless-base-eval.jsonl.gz"
    examples, _ = load_examples(path, "preference")
    texts = [e.prompt + str(c) for e in examples for c in e.completions]
    tokenizer = byte_bpe(tuple(texts), size=2000)
    groups, counts = tokenize(examples, tokenizer, max_length=None)
    assert len(groups) == 312 and not any(counts.values())
    for e, g in zip(examples, groups, strict=True):
        assert tokenizer.decode(g.prompt[1:]) == e.prompt
        assert tuple(tokenizer.decode(ids[:-1]) for ids in g.completions) == e.completions


def test_tokens_take_four_bytes(monkeypatch):
    """And few examples lie there as lists at once: in turn is as all together."""
    tokenizer = words(["<e>"], eos_token="<e>")
    examples = [Example("Hi ", (w, "a"), i, f"data:{i}", {}) for i, w in enumerate(WORDS[4:15])]
    together, counts = compact(examples, tokenizer)
    one = together[0]
    assert {type(tokens) for tokens in (one.prompt, *one.completions)} == {array.array}
    assert one.prompt.itemsize == 4
    monkeypatch.setattr("fastpref.data.tokenize._AT_ONCE", 3)
    assert compact(examples, tokenizer) == (together, counts)
