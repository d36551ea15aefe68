//! Chance that can be had again: a test that fails says its seed, and `CLAVIGER_SEED` brings it back.

/// A source of numbers (SplitMix64), which says its seed where the test that holds it fails.
pub(super) struct Seed {
    first: u64,
    state: u64,
}

impl Seed {
    /// The one that `CLAVIGER_SEED` says, or `usual`.
    pub(super) fn or(usual: u64) -> Self {
        let said = std::env::var("CLAVIGER_SEED").ok();
        let first = said.map_or(usual, |text| text.parse().expect("CLAVIGER_SEED is a number"));
        Self { first, state: first }
    }

    /// Another source, of the same seed and of this number alone.
    pub(super) fn branch(&self, number: u64) -> Self {
        Self { first: self.first, state: self.first ^ number.wrapping_mul(0xD6E8_FEB8_6659_FD93) }
    }

    /// Any number below `bound`.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("again with: CLAVIGER_SEED={}", self.first);
        }
    }
}
