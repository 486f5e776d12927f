"""What crosses the wire: requests, forms, replies, errors and event streams. Knows no engine and no route."""
