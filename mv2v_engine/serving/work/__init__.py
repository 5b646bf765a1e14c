"""The making of turns: the queue, the processes that own an engine, the files that come out."""
