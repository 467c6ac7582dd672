"""Models in other libraries' formats: Hugging Face (both directions) and CTranslate2. See docs/interop.md."""
