"""What two vocabularies are to each other: maps between them, encoding rules, and the queries of `cover`."""
