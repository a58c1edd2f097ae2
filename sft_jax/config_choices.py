"""Values that a config may choose from, where there are many."""

ROW_FORMATS = (
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "question-answer",
    "prompt-completion",
    "text",
    "tokens",
)

# Rules of the lint that can leave out single rows; sft_jax/data/lint/rules.py has all.
LEAVE_OUT = (
    "exact_duplicates",
    "near_duplicates",
    "leaks",
    "empty_answers",
    "cut_off_answers",
    "unfinished_answers",
    "copied_questions",
    "script_outliers",
    "length_outliers",
    "secrets",
)
