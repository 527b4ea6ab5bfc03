"""What more than one test file uses: models, tokenizers, oracles, the command line. No test lives here."""
