"""Low-rank adapters: attached through PEFT to any base, saved as stock PEFT adapters, merged into dense weights."""
