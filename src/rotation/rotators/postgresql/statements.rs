//! What is said to the server. Every change of a role is one `DO` block:
//!
//! ```text
//! DO  wait for the pair's lock ─▶ touch both roles ─▶ read the fence ─┬─▶ another secret's: CLV05, nothing is changed
//!      (advisory, per database)    (row locks, per cluster)           ├─▶ higher: CLV01, likewise
//!                                                                     └─▶ change ─▶ write the fence ─▶ commit
//! ```
//!
//! The fence stands at the end of the two login roles' comments, behind whatever people wrote there:
//!
//! ```text
//! the shop [claviger fence 42 of 0f3a9c17be205d64]
//!                          │     └─ whose: the first 16 digits of the SHA-256, in hex, of "environment/name"
//!                          └─ the higher one of the two roles counts
//! ```
//!
//! Of two secrets that rotate the same user, each would take away the other one's current password. So the first one has
//! it, until a person clears the comments. A fence without an owner is of an earlier version, and taken over.
//!
//! `ALTER ROLE name` without an option changes nothing but takes the role's row until the commit: a second block waits
//! for it, or fails with "tuple concurrently updated", also from another database of the cluster, where an advisory lock
//! does not reach. So between reading the fence and the commit nobody writes one.

use data_encoding::HEXLOWER;
use ring::digest;

use crate::secret::SecretId;

/// The role's comment has a higher fence.
pub(super) const FENCED: &str = "CLV01";
/// Someone is logged in as the role that was to be withdrawn; the message is how many.
pub(super) const IN_USE: &str = "CLV02";
/// The server does not take this verifier for a password; the message is its own.
pub(super) const VALUE_REFUSED: &str = "CLV03";
/// Neither role exists, so there is nothing to write a fence on.
pub(super) const NO_ROLE: &str = "CLV04";
/// A role's fence is of another secret; the message is that one's [owner], a space, and the role's name.
pub(super) const OWNED: &str = "CLV05";

/// What a session of the admin begins with. Set after the login, because poolers refuse to be asked at start-up. A
/// server that may lose a commit in a crash is asked not to.
pub(super) const SETTLE: &str = "SET search_path = pg_catalog; SET standard_conforming_strings = on; \
     SET statement_timeout = '8s'; SET lock_timeout = '5s'; SET idle_in_transaction_session_timeout = '10s'; \
     SET default_transaction_isolation = 'read committed'; \
     SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'";

/// Whether the server is a standby (`t` or `f`), the system identifier of its cluster, and when it started.
pub(super) const OBSERVE: &str = "SELECT pg_catalog.pg_is_in_recovery(), \
     (SELECT system_identifier FROM pg_catalog.pg_control_system()), \
     extract(epoch FROM pg_catalog.pg_postmaster_start_time())";

/// Who is logged in, and as whom that acts.
pub(super) const WHO: &str = "SELECT session_user, current_user";

/// A name, quoted.
pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Text, quoted in a way that means the same whatever `standard_conforming_strings` is.
pub(super) fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    match quoted.contains('\\') {
        true => format!(" E'{}'", quoted.replace('\\', "\\\\")),
        false => format!("'{quoted}'"),
    }
}

/// Of each of these roles that exists: its name, whether it is a superuser, whether its password's time is over.
pub(super) fn roles(names: &[&str]) -> String {
    let names: Vec<_> = names.iter().map(|name| literal(name)).collect();
    format!(
        "SELECT rolname, rolsuper, coalesce(rolvaliduntil <= now(), false) FROM pg_roles WHERE rolname IN ({})",
        names.join(", ")
    )
}

/// Who a fence is of: a secret's name, in a form of which nothing has to be quoted and no long name fills a comment.
pub(super) fn owner(secret: &SecretId) -> String {
    let name = format!("{}/{}", secret.environment, secret.name);
    let hash = digest::digest(&digest::SHA256, name.as_bytes());
    HEXLOWER.encode(hash.as_ref()).chars().take(16).collect()
}

/// Changes behind a fence, of a pair of users.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fenced<'a> {
    pub(super) secret: &'a SecretId,
    pub(super) users: &'a [String; 2],
    pub(super) fence: u64,
}

impl Fenced<'_> {
    /// Writes the fence, and does nothing else.
    pub(super) fn bar(&self) -> String {
        self.block("")
    }

    /// Makes `user` a login role with this verifier, a member of `owner` that acts as `owner`. Each part only where it
    /// is not so already, but for the verifier.
    pub(super) fn set(&self, user: &str, owner: &str, verifier: &str) -> String {
        let (name, named, verifier) = (identifier(user), literal(user), literal(verifier));
        let (owner, owned) = (identifier(owner), literal(owner));
        let change = format!(
            "  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {named}) THEN
    CREATE ROLE {name};
  END IF;
  BEGIN
    ALTER ROLE {name} WITH LOGIN PASSWORD {verifier};
  EXCEPTION WHEN invalid_parameter_value OR invalid_password THEN
    RAISE EXCEPTION USING ERRCODE = '{VALUE_REFUSED}', MESSAGE = SQLERRM;
  END;
  IF NOT EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles o ON o.oid = m.roleid JOIN pg_roles u ON u.oid = m.member
      WHERE o.rolname = {owned} AND u.rolname = {named}) THEN
    GRANT {owner} TO {name};
  END IF;
  IF NOT EXISTS (SELECT FROM pg_db_role_setting s JOIN pg_roles u ON u.oid = s.setrole
      WHERE s.setdatabase = 0 AND u.rolname = {named} AND 'role=' || {owned} = ANY (s.setconfig)) THEN
    ALTER ROLE {name} SET role TO {owned};
  END IF;
"
        );
        self.block(&change)
    }

    /// Takes the password of `user`, unless somebody is logged in with it.
    pub(super) fn retire(&self, user: &str) -> String {
        let (name, named) = (identifier(user), literal(user));
        let change = format!(
            "  SELECT count(*) INTO seen FROM pg_stat_activity WHERE usename = {named};
  IF seen > 0 THEN
    RAISE EXCEPTION USING ERRCODE = '{IN_USE}', MESSAGE = seen::text;
  END IF;
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = {named}) THEN
    ALTER ROLE {name} WITH PASSWORD NULL;
  END IF;
"
        );
        self.block(&change)
    }

    fn block(&self, change: &str) -> String {
        let (fence, secret) = (self.fence, owner(self.secret));
        let users = self.users.each_ref().map(|user| literal(user)).join(", ");
        let body = format!(
            "DECLARE
  seen numeric;
  login record;
BEGIN
  PERFORM pg_advisory_xact_lock({lock});
  FOR login IN SELECT rolname FROM pg_roles WHERE rolname IN ({users}) ORDER BY rolname LOOP
    EXECUTE format('ALTER ROLE %I', login.rolname);
  END LOOP;
  FOR login IN SELECT rolname, substring(shobj_description(oid, 'pg_authid')
      FROM '[[]claviger fence [0-9]+ of ([0-9a-f]+)[]]$') AS secret
      FROM pg_roles WHERE rolname IN ({users}) ORDER BY rolname LOOP
    IF login.secret <> '{secret}' THEN
      RAISE EXCEPTION USING ERRCODE = '{OWNED}', MESSAGE = concat_ws(' ', login.secret, login.rolname);
    END IF;
  END LOOP;
  SELECT max(substring(shobj_description(oid, 'pg_authid')
      FROM '[[]claviger fence ([0-9]+)(?: of [0-9a-f]+)?[]]$')::numeric)
    INTO seen FROM pg_roles WHERE rolname IN ({users});
  IF seen > {fence} THEN
    RAISE EXCEPTION USING ERRCODE = '{FENCED}', MESSAGE = seen::text;
  END IF;
{change}  FOR login IN SELECT rolname, shobj_description(oid, 'pg_authid') AS remark FROM pg_roles
      WHERE rolname IN ({users}) ORDER BY rolname LOOP
    EXECUTE format('COMMENT ON ROLE %I IS %L', login.rolname, concat_ws(' ',
      nullif(regexp_replace(login.remark, ' ?[[]claviger fence [0-9]+( of [0-9a-f]+)?[]]$', ''), ''),
      '[claviger fence {fence} of {secret}]'));
  END LOOP;
  IF NOT FOUND THEN
    RAISE EXCEPTION USING ERRCODE = '{NO_ROLE}', MESSAGE = 'neither role exists';
  END IF;
END",
            lock = self.lock()
        );
        format!("DO LANGUAGE plpgsql {}", literal(&body))
    }

    /// The key of the pair's advisory lock, whichever of the two is named first.
    fn lock(&self) -> i64 {
        let mut users = self.users.each_ref().map(String::as_str);
        users.sort_unstable();
        let text = format!("claviger postgresql-alternating\0{}", users.join("\0"));
        let hash = digest::digest(&digest::SHA256, text.as_bytes());
        hash.as_ref().first_chunk().map_or(0, |bytes| i64::from_be_bytes(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_and_texts_are_quoted() {
        assert_eq!(identifier("app"), "\"app\"");
        assert_eq!(identifier("a\"b\\c'd"), "\"a\"\"b\\c'd\"");
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal("a\\'b"), " E'a\\\\''b'");
        assert_eq!(literal("%s $$ $claviger$ \""), "'%s $$ $claviger$ \"'");
    }

    #[test]
    fn one_lock_for_a_pair_and_another_for_another() {
        let secret = SecretId::parse("prod", "database").unwrap();
        let lock =
            |users: [&str; 2]| Fenced { secret: &secret, users: &users.map(str::to_owned), fence: 1 }.lock();
        assert_eq!(lock(["a", "b"]), lock(["b", "a"]));
        assert_ne!(lock(["a", "b"]), lock(["a", "c"]));
        assert_ne!(lock(["ab", "c"]), lock(["a", "bc"]));
    }

    #[test]
    fn the_owner_of_a_fence_is_what_a_shell_says_it_is() {
        // printf %s prod/database | sha256sum | cut -c 1-16
        let owned = |environment, name| owner(&SecretId::parse(environment, name).unwrap());
        assert_eq!(owned("prod", "database"), "d4e9d6ed4830b775");
        assert_ne!(owned("prod", "database"), owned("test", "database"));
    }

    proptest! {
        /// Reads a literal as the server does, in both of its forms.
        #[test]
        fn a_literal_means_its_text(text in "[a-z'\\\\\"%$ ]{0,40}") {
            let quoted = literal(&text);
            let (inner, escapes) = match quoted.strip_prefix(" E") {
                Some(rest) => (rest, true),
                None => (quoted.as_str(), false),
            };
            let inner = inner.strip_prefix('\'').unwrap().strip_suffix('\'').unwrap();
            prop_assert!(escapes || !inner.contains('\\'));
            let mut read = String::new();
            let mut characters = inner.chars();
            while let Some(character) = characters.next() {
                if character == '\'' || (escapes && character == '\\') {
                    prop_assert_eq!(characters.next(), Some(character));
                }
                read.push(character);
            }
            prop_assert_eq!(read, text);
        }

        /// A quote that ended the block early would stand alone.
        #[test]
        fn nothing_leaves_the_block(user in "[a-z'\\\\\"%$;]{1,20}", owner in "[a-z'\\\\\"%$;]{1,20}") {
            let users = [user.clone(), "other".to_owned()];
            let secret = SecretId::parse("prod", "database").unwrap();
            let sql = Fenced { secret: &secret, users: &users, fence: u64::MAX }.set(&user, &owner, "SCRAM-SHA-256$x");
            let body = sql.strip_prefix("DO LANGUAGE plpgsql ").unwrap();
            let inner = body.trim_start_matches([' ', 'E']).strip_prefix('\'').unwrap();
            let inner = inner.strip_suffix('\'').unwrap();
            prop_assert!(!inner.replace("''", "").contains('\''));
        }
    }
}
