//! What is rotated: in a real server a database of its own, two users who take turns, the role that owns everything, and
//! an admin who may change the two and nothing else.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::support::postgresql::Postgres;

/// A user's name and password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Login {
    pub(super) username: String,
    pub(super) password: String,
}

impl Login {
    pub(super) fn new(username: &str, password: &str) -> Self {
        Self { username: username.to_owned(), password: password.to_owned() }
    }

    /// As secrets have it.
    pub(super) fn json(&self) -> String {
        serde_json::json!({ "username": self.username, "password": self.password }).to_string()
    }
}

/// A database with two users.
pub(super) struct Pair {
    pub(super) port: u16,
    pub(super) database: String,
    pub(super) owner: String,
    pub(super) users: [String; 2],
    /// Who may change the two.
    pub(super) admin: Login,
    /// What the first of the two has at the beginning; the second is not there yet.
    pub(super) first: Login,
}

impl Pair {
    /// Makes one that no other test has.
    pub(super) fn make(server: &Postgres) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |what: &str| format!("shop{number}_{what}");
        let [database, owner, first, second, admin] = ["db", "owner", "a", "b", "admin"].map(name);
        let pair = Self {
            port: port(server),
            admin: Login::new(&admin, "the-admin-0123456789"),
            first: Login::new(&first, "the-first-0123456789"),
            users: [first.clone(), second],
            database,
            owner,
        };
        let Self { database, owner, .. } = &pair;
        server.sql(&format!(
            "CREATE ROLE {owner} NOLOGIN;
             CREATE ROLE {first} LOGIN PASSWORD '{password}' IN ROLE {owner};
             ALTER ROLE {first} SET role TO {owner};
             CREATE ROLE {admin} LOGIN CREATEROLE PASSWORD '{admin_password}';
             GRANT {owner} TO {admin} WITH ADMIN OPTION;
             GRANT {first} TO {admin} WITH ADMIN OPTION;
             CREATE DATABASE {database} OWNER {owner};",
            password = pair.first.password,
            admin_password = pair.admin.password,
        ));
        pair.as_first(
            "CREATE SCHEMA shop; CREATE TABLE shop.proof (at timestamptz DEFAULT now(), version text)",
        )
        .expect("the first user acts as the owner");
        pair
    }

    /// Makes the same roles, with the same passwords, in another cluster, and a database of the same name.
    pub(super) fn double(&self, from: &Postgres, to: &Postgres) {
        let Self { database, owner, admin, users: [first, second], .. } = self;
        let [of_first, of_second, of_admin] =
            [first, second, &admin.username].map(|user| self.verifier(from, user));
        to.sql(&format!(
            "CREATE ROLE {owner} NOLOGIN;
             CREATE ROLE {first} LOGIN PASSWORD '{of_first}' IN ROLE {owner};
             ALTER ROLE {first} SET role TO {owner};
             CREATE ROLE {second} LOGIN PASSWORD '{of_second}' IN ROLE {owner};
             ALTER ROLE {second} SET role TO {owner};
             CREATE ROLE {admin} LOGIN CREATEROLE PASSWORD '{of_admin}';
             GRANT {owner}, {first}, {second} TO {admin} WITH ADMIN OPTION;
             CREATE DATABASE {database} OWNER {owner};",
            admin = admin.username,
        ));
    }

    /// Whether this login gets in, and may do what the owner may.
    pub(super) fn lets_in(&self, login: &Login) -> Result<(), String> {
        psql(self.port, &self.database, login, "COMMENT ON SCHEMA shop IS 'proof'").map(drop)
    }

    fn as_first(&self, sql: &str) -> Result<String, String> {
        psql(self.port, &self.database, &self.first, sql)
    }

    /// What the server keeps of a user's password.
    pub(super) fn verifier(&self, server: &Postgres, user: &str) -> String {
        server.sql(&format!("SELECT coalesce(rolpassword, '') FROM pg_authid WHERE rolname = '{user}'"))
    }

    /// Both verifiers.
    pub(super) fn verifiers(&self, server: &Postgres) -> [String; 2] {
        self.users.each_ref().map(|user| self.verifier(server, user))
    }
}

/// Where the server listens, at 127.0.0.1.
pub(super) fn port(server: &Postgres) -> u16 {
    server.place().rsplit_once(':').unwrap().1.parse().unwrap()
}

/// How often the server has turned a password down so far.
pub(super) fn failed_logins(server: &Postgres) -> usize {
    server.log().lines().filter(|line| line.contains("password authentication failed")).count()
}

/// Runs SQL over TCP, as a program that is not ours.
fn psql(port: u16, database: &str, login: &Login, sql: &str) -> Result<String, String> {
    let output = Command::new("psql")
        .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", &port.to_string()])
        .args(["-U", &login.username, "-d", database, "-c", sql])
        .env("PGPASSWORD", &login.password)
        .env("PGCONNECT_TIMEOUT", "30")
        .env("PGPASSFILE", "/dev/null")
        .current_dir(Path::new("/"))
        .output()
        .expect("psql is installed; `bash tests/run` installs it");
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}
