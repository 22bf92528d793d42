"""Loss masks with chat templates of many families: what is trained is each answer with its end mark, and nothing else."""

import numpy as np
import pytest
from conftest import encode, make_tokenizer

from tune_magic.data.content import PromptCompletion, Turns
from tune_magic.data.render import Renderer
from tune_magic.errors import DataError

# Written for these tests, in the manner of the families they are named after. None marks its answers for training.
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": (_CHATML, "<|im_end|>"),
    "llama2": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set rest = messages[1:] if system else messages %}"
        "{% for m in rest %}{% if m.role == 'user' %}<s>[INST] "
        "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}",
        " </s>",
    ),
    "llama3": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "mistral": (  # the system message stands in the last user turn, so earlier turns are rewritten
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set rest = messages[1:] if system else messages %}{% set last = rest | map(attribute='role') | list %}"
        "{% for m in rest %}{% if m.role == 'user' %}[INST] "
        "{% if system and 'user' not in last[loop.index:] %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        "</s>",
    ),
    "gemma": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "phi": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|end|>",
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "</s>",
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} "
        "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        "</s>",
    ),
    "thinking": (  # earlier thoughts are dropped, and an answer without one gets an empty one to begin with
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
        "<|im_end|>",
    ),
    "default_system": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + _CHATML,
        "<|im_end|>",
    ),
    "tools": (
        "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content }}{% for call in m.tool_calls or [] %}<|call|>{{ call.function | tojson }}{% endfor %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|end|>",
    ),
}  # fmt: skip
REWRITES = ("mistral", "thinking")  # with more than one answer, earlier ones look different
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3+3?"}, {"role": "assistant", "content": "It is 6 < 7 & ünï."},
]  # fmt: skip


def tokenizer_of(family):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[family][0]
    return tokenizer


def examples_of(tokenizer, content, max_length=2048):
    return encode(Renderer(tokenizer, chat_template=True, max_length=max_length), [content])


def spans(tokenizer, example):
    trained = np.flatnonzero(example.trunk.weights > 0)
    runs = np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)
    return [tokenizer.decode(example.trunk.tokens[run].tolist()) for run in runs]


def messages_for(family, messages):
    return messages if family == "gemma" else [SYSTEM, *messages]


def prompt_text(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def learned(family, tokenizer, messages, answer):
    """What the model must write after its prompt: the answer, and what the template puts behind it."""
    lead = " " if family in ("llama2", "mistral") else ""
    return f"{lead}{answer}{TEMPLATES[family][1]}"


@pytest.mark.parametrize("family", TEMPLATES)
def test_an_answer_is_trained_and_nothing_else(family):
    tokenizer, messages = tokenizer_of(family), messages_for(family, CHAT[:2])
    (example,) = examples_of(tokenizer, Turns(messages))
    assert spans(tokenizer, example) == [learned(family, tokenizer, messages, "It is 4.")]
    assert tokenizer.decode(example.prompt.tolist()) == prompt_text(tokenizer, messages[:-1])
    asked = Renderer(tokenizer, chat_template=True, max_length=2048).prompt_tokens(messages[:-1])
    assert example.prompt.tolist() == asked  # what is trained and what is asked are the same tokens


@pytest.mark.parametrize("family", TEMPLATES)
def test_each_answer_of_a_chat_is_trained_as_it_is_given(family):
    tokenizer, messages = tokenizer_of(family), messages_for(family, CHAT)
    found = examples_of(tokenizer, Turns(messages))
    answers = [learned(family, tokenizer, messages, message["content"]) for message in (CHAT[1], CHAT[3])]
    assert [span for example in found for span in spans(tokenizer, example)] == answers
    assert len(found) == (2 if family in REWRITES else 1)
    for example, last in zip(found, (-3, -1), strict=False) if len(found) == 2 else [(found[0], -1)]:
        assert tokenizer.decode(example.prompt.tolist()) == prompt_text(tokenizer, messages[:last])
        assert example.index == 0
    if family not in REWRITES:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(found[0].trunk.tokens.tolist()) == whole.rstrip("\n")


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompt_and_completion_are_a_chat_of_one_answer(family):
    tokenizer = tokenizer_of(family)
    system = None if family == "gemma" else SYSTEM["content"]
    (example,) = examples_of(tokenizer, PromptCompletion("What is 2+2?", "It is 4.", system))
    (same,) = examples_of(tokenizer, Turns(messages_for(family, CHAT[:2])))
    assert example.trunk.tokens.tolist() == same.trunk.tokens.tolist()
    assert example.trunk.weights.tolist() == same.trunk.weights.tolist()


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_cut_keeps_the_mask_of_what_is_left(family):
    tokenizer, content = tokenizer_of(family), Turns(messages_for(family, CHAT))
    whole = examples_of(tokenizer, content)
    for example in whole:
        first = int(np.flatnonzero(example.trunk.weights > 0)[0])
        cut = examples_of(tokenizer, content, max_length=first + 3)
        same = [c for c in cut if np.array_equal(c.trunk.tokens, example.trunk.tokens[: first + 3])]
        assert len(same) == 1
        assert same[0].trunk.weights.tolist() == example.trunk.weights[: first + 3].tolist()
        assert same[0].num_cut == len(example) - first - 3
    first = min(int(np.flatnonzero(example.trunk.weights > 0)[0]) for example in whole)  # of all the chat's answers
    with pytest.raises(DataError, match="no trained token is left within max_length"):
        examples_of(tokenizer, content, max_length=first)


def test_a_template_without_system_messages_says_what_to_do():
    with pytest.raises(DataError, match=r"System role not supported.*beginning of the first user message"):
        examples_of(tokenizer_of("gemma"), Turns([SYSTEM, *CHAT]))


def test_thoughts_are_trained_where_they_are_given():
    tokenizer = tokenizer_of("thinking")
    thought = [CHAT[0], {"role": "assistant", "content": "<think>hm</think>It is 4."}, *CHAT[2:]]
    first, second = examples_of(tokenizer, Turns(thought))
    assert spans(tokenizer, first) == ["<think>hm</think>It is 4.<|im_end|>"]
    assert "hm" not in tokenizer.decode(second.trunk.tokens.tolist())  # the template drops it from then on
    assert spans(tokenizer, second) == ["It is 6 < 7 & ünï.<|im_end|>"]


def test_tools_and_calls_reach_the_template():
    tokenizer = tokenizer_of("tools")
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [
        CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"}, CHAT[1],
    ]  # fmt: skip
    (example,) = examples_of(tokenizer, Turns(messages, tools=[tool]))
    assert tokenizer.decode(example.trunk.tokens.tolist()).startswith('<|tools|>[{"type": "function"')
    said, answered = spans(tokenizer, example)
    assert said == '<|call|>{"name": "add", "arguments": {"a": 2}}<|end|>'
    assert answered == "It is 4.<|end|>"


def test_an_answer_of_weight_0_is_seen_and_not_trained():
    tokenizer = tokenizer_of("chatml")
    (example,) = examples_of(tokenizer, Turns([CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]))
    assert spans(tokenizer, example) == ["It is 6 < 7 & ünï.<|im_end|>"]
    assert "It is 4." in tokenizer.decode(example.trunk.tokens.tolist())
