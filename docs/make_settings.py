"""Write docs/settings.md, the list of all settings, from the code: python docs/make_settings.py."""

from pathlib import Path

from distributed.commands.settings import as_page

PAGE = Path(__file__).parent / "settings.md"

if __name__ == "__main__":
    PAGE.write_text(as_page())
