"""Chat templates in the forms that published models have them, each with its special tokens."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Template:
    """A template.

    Attributes:
      source: Jinja.
      bos: the token that it calls `bos_token`, if any.
      eos: the token that it calls `eos_token`.
      special: its other special tokens.
    """

    source: str
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(filter(None, (self.bos, self.eos, *self.special))))


CHATML = Template(
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    bos=None,
    eos="<|im_end|>",
    special=("<|im_start|>",),
)

LLAMA_3 = Template(
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    special=("<|start_header_id|>", "<|end_header_id|>"),
)

GEMMA = Template(
    """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
    bos="<bos>",
    eos="<eos>",
    special=("<start_of_turn>", "<end_of_turn>"),
)

MISTRAL = Template(
    """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
""",
    bos="<s>",
    eos="</s>",
    special=("[INST]", "[/INST]"),
)

# Answers are asked for with an opened thought, which the ones before were written without.
THINKING = Template(
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<|User|>' + message.content }}"
    "{% elif message.role == 'assistant' %}"
    "{{ '<|Assistant|>' + message.content.split('</think>') | last + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    bos="<|begin|>",
    eos="<|end|>",
    special=("<|User|>", "<|Assistant|>"),
)

# Thoughts are kept in the last answer alone: the same answer is written in two ways.
FORGETFUL = Template(
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.role == 'assistant' and not loop.last %}"
    "{{ message.content.split('</think>') | last }}"
    "{% else %}{{ message.content }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    bos=None,
    eos="<|end|>",
    special=("<|user|>", "<|assistant|>", "<|system|>"),
)

MARKED = Template(
    """\
{% for message in messages %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content if loop.last else message.content.split('</think>') | last }}
            {{- eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
""",
    bos=None,
    eos="<|end|>",
    special=("<|user|>", "<|assistant|>", "<|system|>"),
)

# Everything that the environment of chat templates has and plain Jinja has not.
EVERYTHING = Template(
    """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- continue %}
    {%- endif %}
    {%- if loop.index0 > 6 %}
        {%- break %}
    {%- endif %}
    {% if true %}
    {{ '[' + message.role + ']' }}
    {% endif %}
{{ message | tojson }}|{{ message.content | tojson(indent=2) }}{{ strftime_now('%Y') | length }}
    {{- eos_token }}
{% endfor %}
{%- if add_generation_prompt %}
{{ '[assistant]' }}
{%- endif %}""",
    bos="<s>",
    eos="</s>",
)

TEMPLATES = {
    "chatml": CHATML,
    "llama 3": LLAMA_3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "thinking": THINKING,
    "forgetful": FORGETFUL,
    "marked": MARKED,
    "everything": EVERYTHING,
}
