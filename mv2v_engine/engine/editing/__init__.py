"""Long videos edited by instruction, window by window (METHOD 10 and 11)."""
