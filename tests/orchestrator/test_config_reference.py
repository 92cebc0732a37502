from pathlib import Path

from orchestrator.config.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_in_docs_is_the_one_that_the_models_make():
    assert PAGE.read_text() == reference(), "python -m orchestrator.config.reference > docs/config.md"


def test_the_page_names_keys_with_their_defaults_and_bounds():
    page = reference()

    assert "| `deadline_s` | number > 0 | `120` |" in page
    assert "| `engine` | string | **required** |" in page
    assert "[OpenAI](#openai)" in page
    assert "| `extra_body` | mapping | `{}` | Put over the body; null takes a key out. |" in page
