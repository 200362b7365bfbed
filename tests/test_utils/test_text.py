# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from pathlib import Path

import pytest

from mlla_mm.utils.text import describe_error, listed, printable


class Talkative:
    def __repr__(self):
        raise AssertionError('asked for its text')

    __str__ = __repr__


@pytest.mark.parametrize(
    'value, expected',
    [
        ('photo 1.jpg', 'photo 1.jpg'),
        ('Straße/写真.png', 'Straße/写真.png'),
        ('', ''),
        (Path('a/b.jpg'), 'a/b.jpg'),
        ('two\nlines', r'two\nlines'),
        ('\x1b[31mred\x1b[0m', r'\x1b[31mred\x1b[0m'),
        ('\x1b]0;title\x07', r'\x1b]0;title\x07'),
        ('\x9b2J', r'\x9b2J'),  # the same as ESC [ in one character
        ('gpj.\u202eexe', r'gpj.\u202eexe'),  # writes backwards
        ('\u2028', r'\u2028'),
        # What Python makes of a file's name that is not UTF-8.
        ('\udcff.jpg', r'\udcff.jpg'),
        (b'name\x00\xff', r'name\x00\xff'),
        (3, '3'),
        (0.5, '0.5'),
        (True, 'True'),
        (None, 'None'),
        ([Talkative()], '<list>'),
        ({'a': Talkative()}, '<dict>'),
        (Talkative(), '<Talkative>'),
        (type('\x1b[2J', (), {})(), r'<\x1b[2J>'),
    ],
)
def test_printable(value, expected):
    assert printable(value) == expected
    assert printable(value).isprintable()


def test_shortens():
    assert printable('a' * 200) == 'a' * 200
    assert printable('a' * 300 + 'b' * 300) == 'a' * 100 + '...' + 'b' * 100
    assert printable('abcdefgh', limit=5) == 'abc...gh'
    assert printable('abcdefgh', limit=1) == 'a...'
    assert printable(10**5000) == '<int of 16610 bits>'
    assert printable('\n' * 10**6, limit=2) == r'\n...\n'
    assert printable(b'a' * 10**6 + b'b' * 10**6, limit=4) == 'aa...bb'


def test_errors_are_one_line():
    error = ValueError('two\n  lines\x1b[31m')
    assert describe_error(error) == r'ValueError: two lines\x1b[31m'
    assert describe_error(MemoryError()) == 'MemoryError'


@pytest.mark.parametrize(
    'words, text',
    [
        ('a', 'a'),
        ('ab', 'a or b'),
        ('abcd', 'a, b, c or d'),
        ('abcde', 'a, b, c, d or 1 more'),
        ('abcdefg', 'a, b, c, d or 3 more'),
    ],
)
def test_words_of_a_list(words, text):
    assert listed(words, 'or') == text
