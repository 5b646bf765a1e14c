"""Operations: one file each with contract, reference, fake and dispatch. Torch only."""
