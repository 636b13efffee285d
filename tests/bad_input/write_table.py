"""Regenerates docs/errors.md: python tests/bad_input/write_table.py"""

from collect import TABLE, table

if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(), encoding="utf-8")
    print(f"wrote {TABLE}")
