"""Chat templates of every shape, and what each makes of a conversation, written by hand.

In an expected text `‖` ends the prompt, and what counts stands between ⟦ and ⟧.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import tiny
from tokenised import assistant


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def tool(content: str) -> dict:
    return {"role": "tool", "content": content}


# ---------------------------------------------------------------- expectations


@dataclass
class Expected:
    """A prompt and one completion, as token ids, and which tokens of the completion count."""

    prompt: list[int]
    completion: list[int]
    is_counted: list[bool]


def marked(tokenizer: Any, text: str) -> Expected:
    """The tokens that the stock tokenizer finds in the whole text."""
    prompt, _, _ = text.partition("‖")
    spans = []  # of what counts
    position = 0
    for piece in re.split("([⟦⟧])", text.replace("‖", "")):
        if piece == "⟦":
            spans.append(range(position, len(text)))
        elif piece == "⟧":
            spans[-1] = range(spans[-1].start, position)
        else:
            position += len(piece)

    encoding = tokenizer(re.sub("[‖⟦⟧]", "", text), add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoding["offset_mapping"]]
    length = sum(start < len(prompt) for start in starts)
    is_counted = [any(start in span for span in spans) for start in starts]
    ids = encoding["input_ids"]
    return Expected(ids[:length], ids[length:], is_counted[length:])


# ---------------------------------------------------------------- templates

QUESTION = [user("is it ok?")]
ONE_TURN = [assistant("yes")]
THREE_TURNS = [assistant("yes"), user("and you?"), assistant("no"), tool("42"), assistant("it is ok")]


@dataclass
class Shape:
    """A chat template, and what it makes of QUESTION with ONE_TURN and with THREE_TURNS."""

    template: str
    special: tuple[str, ...]
    eos: str
    ends: tuple[str, ...]  # of turns
    one: str
    three: str
    notes: tuple[str, ...] = ()


TURN_BY_TURN = "{% for message in messages %}BODY{% endfor %}"
CHATML = Shape(
    tiny.CHATML,
    ("<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
    ("<|im_end|>",),
    "<|im_start|>user\nis it ok?<|im_end|>\n<|im_start|>assistant\n‖⟦yes<|im_end|>⟧",
    "<|im_start|>user\nis it ok?<|im_end|>\n<|im_start|>assistant\n‖⟦yes<|im_end|>⟧"
    "\n<|im_start|>user\nand you?<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧"
    "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n⟦it is ok<|im_end|>⟧",
)
GEMMA = Shape(
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<start_of_turn>", "<end_of_turn>"),
    "</s>",
    ("</s>", "<end_of_turn>"),
    "<s><start_of_turn>user\nis it ok?<end_of_turn>\n<start_of_turn>model\n‖⟦yes<end_of_turn>⟧",
    "<s><start_of_turn>user\nis it ok?<end_of_turn>\n<start_of_turn>model\n‖⟦yes<end_of_turn>⟧"
    "\n<start_of_turn>user\nand you?<end_of_turn>\n<start_of_turn>model\n⟦no<end_of_turn>⟧"
    "\n<start_of_turn>tool\n42<end_of_turn>\n<start_of_turn>model\n⟦it is ok<end_of_turn>⟧",
)
LLAMA_3 = Shape(
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|head|>' + message.role + '<|end_head|>\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|end_head|>\n' }}{% endif %}",
    ("<|head|>", "<|end_head|>", "<|eot_id|>"),
    "</s>",
    ("</s>", "<|eot_id|>"),
    "<s><|head|>user<|end_head|>\nis it ok?<|eot_id|><|head|>assistant<|end_head|>\n‖⟦yes<|eot_id|>⟧",
    "<s><|head|>user<|end_head|>\nis it ok?<|eot_id|><|head|>assistant<|end_head|>\n‖⟦yes<|eot_id|>⟧"
    "<|head|>user<|end_head|>\nand you?<|eot_id|><|head|>assistant<|end_head|>\n⟦no<|eot_id|>⟧"
    "<|head|>tool<|end_head|>\n42<|eot_id|><|head|>assistant<|end_head|>\n⟦it is ok<|eot_id|>⟧",
)
MISTRAL = Shape(
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}"
    "{% elif message.role == 'tool' %}{{ '[RESULT] ' + message.content + '[/RESULT]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}",
    ("[INST]", "[/INST]", "[RESULT]", "[/RESULT]"),
    "</s>",
    ("</s>",),
    "<s>[INST] is it ok?[/INST]‖⟦ yes</s>⟧",
    "<s>[INST] is it ok?[/INST]‖⟦ yes</s>⟧[INST] and you?[/INST]⟦ no</s>⟧[RESULT] 42[/RESULT]⟦ it is ok</s>⟧",
)
LLAMA_2 = Shape(
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ ' ' + message.content + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}",
    (),
    "</s>",
    ("</s>",),
    "<s>[INST] is it ok? [/INST]‖⟦ yes </s>⟧",
    "<s>[INST] is it ok? [/INST]‖⟦ yes </s>⟧<s>[INST] and you? [/INST]⟦ no </s>⟧<s>[INST] 42 [/INST]⟦ it is ok </s>⟧",
)
PHI_3 = Shape(
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
    "</s>",
    ("</s>", "<|end|>"),
    "<|user|>\nis it ok?<|end|>\n<|assistant|>\n‖⟦yes<|end|>⟧",
    "<|user|>\nis it ok?<|end|>\n<|assistant|>\n‖⟦yes<|end|>⟧\n<|user|>\nand you?<|end|>\n<|assistant|>\n"
    "⟦no<|end|>⟧\n<|tool|>\n42<|end|>\n<|assistant|>\n⟦it is ok<|end|>⟧",
)
GLM = Shape(
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|tool|>"),
    "</s>",
    ("</s>", "<|user|>"),
    "[gMASK]<sop><|user|>\nis it ok?<|assistant|>‖⟦\nyes<|user|>⟧",
    "[gMASK]<sop><|user|>\nis it ok?<|assistant|>‖⟦\nyes<|user|>⟧\nand you?<|assistant|>⟦\nno<|tool|>⟧"
    "\n42<|assistant|>⟦\nit is ok<|user|>⟧",
)
QWEN_3 = Shape(
    "{% set ns = namespace(query=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% set thoughts = message.reasoning_content or '' %}"
    "{% if '</think>' in message.content %}"
    "{% set thoughts = message.content.split('</think>')[0].split('<think>')[-1] %}{% endif %}"
    "{% if message.role == 'assistant' and loop.index0 > ns.query and (loop.last or thoughts) %}"
    "{{ '<think>\n' + thoughts.strip() + '\n</think>\n\n' }}{% endif %}"
    "{{ message.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
    ("<|im_end|>",),
    "<|im_start|>user\nis it ok?<|im_end|>\n<|im_start|>assistant\n‖⟦<think>\n\n</think>\n\nyes<|im_end|>⟧",
    "<|im_start|>user\nis it ok?<|im_end|>\n<|im_start|>assistant\n‖⟦yes<|im_end|>⟧"
    "\n<|im_start|>user\nand you?<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧"
    "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nit is ok<|im_end|>⟧",
)
R1 = Shape(
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '<|Bot|>' + message.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<|' + message.role + '|>' + message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Bot|><think>\n' }}{% endif %}",
    ("<|user|>", "<|tool|>", "<|Bot|>"),
    "</s>",
    ("</s>",),
    "<s><|user|>is it ok?<|Bot|>‖⟦yes</s>⟧",
    "<s><|user|>is it ok?<|Bot|>‖⟦yes</s>⟧<|user|>and you?<|Bot|>⟦no</s>⟧<|tool|>42<|Bot|>⟦it is ok</s>⟧",
    ("prompts without the '<think>\\n' of the chat template",),
)
COHERE = Shape(
    "{{ bos_token }}{% for message in messages %}{{ '<|turn|><|' + message.role + '|>' }}"
    "{% if message.role == 'assistant' %}{{ '<|say|>' + message.content + '<|said|>' }}"
    "{% else %}{{ message.content }}{% endif %}<|end_turn|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|><|assistant|>' }}{% endif %}",
    ("<|turn|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|say|>", "<|said|>", "<|end_turn|>"),
    "</s>",
    ("</s>", "<|end_turn|>"),
    "<s><|turn|><|user|>is it ok?<|end_turn|><|turn|><|assistant|>‖⟦<|say|>yes<|said|><|end_turn|>⟧",
    "<s><|turn|><|user|>is it ok?<|end_turn|><|turn|><|assistant|>‖⟦<|say|>yes<|said|><|end_turn|>⟧"
    "<|turn|><|user|>and you?<|end_turn|><|turn|><|assistant|>⟦<|say|>no<|said|><|end_turn|>⟧"
    "<|turn|><|tool|>42<|end_turn|><|turn|><|assistant|>⟦<|say|>it is ok<|said|><|end_turn|>⟧",
)
PHI_3_MINI = Shape(  # as PHI_3, without line breaks behind the ends
    PHI_3.template.replace("<|end|>\n", "<|end|>"),
    PHI_3.special,
    "</s>",
    ("</s>", "<|end|>"),
    PHI_3.one.replace("<|end|>\n", "<|end|>"),
    PHI_3.three.replace("<|end|>⟧\n", "<|end|>⟧").replace("<|end|>\n", "<|end|>"),
)
GPT_OSS = Shape(
    "{% for message in messages %}{{ '<|start|>' + message.role + '<|message|>' + message.content }}"
    "{% if loop.last and message.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    ("<|start|>", "<|message|>", "<|end|>", "<|return|>"),
    "</s>",
    ("</s>", "<|return|>"),
    "<|start|>user<|message|>is it ok?<|end|><|start|>assistant‖⟦<|message|>yes<|return|>⟧",
    "<|start|>user<|message|>is it ok?<|end|><|start|>assistant‖⟦<|message|>yes<|end|>⟧"
    "<|start|>user<|message|>and you?<|end|><|start|>assistant⟦<|message|>no<|end|>⟧"
    "<|start|>tool<|message|>42<|end|><|start|>assistant⟦<|message|>it is ok<|return|>⟧",
)
SHAPES = {
    "chatml": CHATML,
    "gemma": GEMMA,
    "llama 3": LLAMA_3,
    "mistral": MISTRAL,
    "llama 2": LLAMA_2,
    "phi 3": PHI_3,
    "phi 3 mini": PHI_3_MINI,
    "gpt-oss": GPT_OSS,
    "glm": GLM,
    "qwen 3": QWEN_3,
    "r1": R1,
    "cohere": COHERE,
}


@functools.cache
def tokenizer_of(name: str) -> Any:
    return make_tokenizer(SHAPES[name])


def make_tokenizer(shape: Shape) -> Any:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(shape.special)})
    tokenizer.eos_token = shape.eos
    tokenizer.chat_template = shape.template
    return tokenizer
