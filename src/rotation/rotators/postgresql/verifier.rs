//! SCRAM-SHA-256 verifiers, made here: the server stores one as it is (PostgreSQL documentation, "Password
//! Authentication" and `pg_authid`), so that no password is in a statement, and so in no log of the server.
//!
//! ```text
//! SCRAM-SHA-256$<iterations>:<salt>$<stored key>:<server key>        the last three in base64
//! ```

use std::num::NonZeroU32;

use data_encoding::BASE64;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::{digest, hmac, pbkdf2};
use zeroize::Zeroizing;

use crate::rotation::{Failure, Trouble};

/// What PostgreSQL uses itself, and RFC 7677 asks for at least.
const ITERATIONS: NonZeroU32 = NonZeroU32::MIN.saturating_add(4_095);
const SALT_BYTES: usize = 16;

/// How a verifier begins: what holds this is not shown.
pub(super) const PREFIX: &str = "SCRAM-SHA-256$";

/// The verifier of a password of printable ASCII, which SASLprep (RFC 4013) leaves as it is.
pub(super) fn verifier(password: &str) -> Result<String, Failure> {
    let mut salt = [0_u8; SALT_BYTES];
    SystemRandom::new().fill(&mut salt).map_err(|_| {
        Failure::new(Trouble::Defect, "the system gives no random bytes for a salt; try again")
    })?;
    Ok(with_salt(password, &salt))
}

/// RFC 5802, section 3.
fn with_salt(password: &str, salt: &[u8]) -> String {
    let mut salted = Zeroizing::new([0_u8; digest::SHA256_OUTPUT_LEN]);
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, ITERATIONS, salt, password.as_bytes(), salted.as_mut_slice());
    let key = hmac::Key::new(hmac::HMAC_SHA256, salted.as_slice());
    let stored = digest::digest(&digest::SHA256, hmac::sign(&key, b"Client Key").as_ref());
    let server = hmac::sign(&key, b"Server Key");
    let [salt, stored, server] = [salt, stored.as_ref(), server.as_ref()].map(|bytes| BASE64.encode(bytes));
    format!("{PREFIX}{ITERATIONS}:{salt}${stored}:{server}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_7677_comes_out() {
        let salt = BASE64.decode(b"W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        assert_eq!(
            with_salt("pencil", &salt),
            "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$\
             WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
        );
    }

    #[test]
    fn each_has_a_salt_of_its_own() {
        let [one, two] = [verifier("pencil").unwrap(), verifier("pencil").unwrap()];
        assert_ne!(one, two);
        assert!(one.starts_with("SCRAM-SHA-256$4096:"), "{one}");
    }
}
