"""collegium eval run: a policy's answers to questions with known answers, beside what each expert gives alone."""
