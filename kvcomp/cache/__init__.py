"""The life of a token: window, pages, tables, and what attends over them."""
