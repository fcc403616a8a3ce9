"""Chat templates: what writes a conversation down passes, what could do more is refused before it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny as builders

from ldrt_edge.chat_template import check_template
from ldrt_edge.errors import ArtifactError
from ldrt_edge.front import Front, Message
from ldrt_edge.train.starter import CHAT_TEMPLATE

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>' + system_message + '<</SYS>>' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
COUNTING = (
    "{% set ns = namespace(first=true, index=0) %}{% for m in messages %}{% set ns.index = ns.index + 1 %}"
    "{% if ns.first and m.role == 'user' %}{{ m.content | trim | upper }}{% set ns.first = false %}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("template", [*builders._TEMPLATES.values(), CHAT_TEMPLATE, LLAMA2, COUNTING])
def test_what_writes_a_conversation_down_passes(template: str) -> None:
    check_template(template)


HOSTILE = {
    "a text without end": "{{ 'x' * 9999999999 }}",
    "a number without end": "{{ 9 ** 9 ** 9 }}",
    "a text that doubles": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "two texts that grow each other": "{% set a = 'ab' %}{% set b = a %}"
    + "{% set a = a + b %}{% set b = b + a %}" * 60,
    "one that doubles with each message": (
        "{% set ns = namespace(a='x') %}{% for m in messages %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}"
    ),
    "one that doubles by replacing": "{% set a = 'aa' %}" + "{% set a = a.replace('a', 'aa') %}" * 60,
    "one that doubles by a filter": "{% set a = 'aa' %}" + "{% set a = a | replace('a', 'aa') %}" * 60,
    "a block of text that grows": "{% set a %}x{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "loops within loops": "{% for a in messages %}" * 4 + "x" + "{% endfor %}" * 4,
    "a loop over numbers": "{% for a in range(99999) %}x{% endfor %}",
    "a loop over a made-up list": "{% for a in [1, 2, 3] %}x{% endfor %}",
    "a loop that calls itself": "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "a function that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "Python's insides": "{{ ''.__class__.__mro__ }}",
    "Python's insides by a filter": "{{ '' | attr('__class__') }}",
    "Python's insides by a text": "{{ ''['__class__'] }}{{ lipsum() }}",
    "a format": "{{ '%999999999d' | format(1) }}",
    "a method that formats": "{{ '{:>999999999}'.format(1) }}",
    "padding": "{{ 'x'.center(999999999) }}",
    "other files": "{% include '/etc/passwd' %}",
    "other templates": "{% import 'x' as y %}",
    "a parent": "{% extends 'x' %}",
    "no template": "{% for %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep sums": "{{ " + "1 + " * 3000 + "1 }}",
    "too long": "x" * 100_000,
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_what_could_do_more_is_refused_in_one_line(template: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        check_template(template)
    assert "\n" not in str(caught.value)


def test_a_model_with_such_a_template_does_not_answer(tiny: builders.Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llava15", "smollm2"), folder)
    Front.from_hf(folder).save(folder)
    settings = json.loads((folder / "front.json").read_text())
    for changes, why in (
        ({"chat_template": HOSTILE["a text without end"]}, "mul"),
        ({"image_size": 10**6}, "image_size"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std"),
        ({"stop_ids": ["2"]}, "stop_ids"),
        ({"special_tokens": []}, "special_tokens"),
    ):
        (folder / "front.json").write_text(json.dumps(settings | changes))
        with pytest.raises(ArtifactError, match=why):
            Front.load(folder).render([Message("user", "Hello")])
