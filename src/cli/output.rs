//! What is printed, and what is asked for: the only file that writes to stdout and stderr or prompts.
//!
//! stdout carries the answer and nothing else; notices, prompts and errors go to stderr. No colours are used anywhere,
//! which is what `NO_COLOR` asks for. Every write goes to the file descriptor itself: no buffer keeps a value.
//!
//! With `--output json` an answer is one JSON document on one line (following the audit log: one per record). Members
//! are added over time, never renamed or removed; what is not known or does not apply is `null`; times are RFC 3339 in
//! UTC. Each subcommand's file shows its shape. An error is `{"error":{"reason","message","request_id"}}` on stderr.
//! Help and the version are always text. No error shows the secret part of one of the broker's tokens.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};

use jiff::Timestamp;
use serde::Serialize;
use zeroize::Zeroizing;

use super::exit::CliError;
use crate::error::Reason;

/// How answers and errors are written: for people, or stable for programs. (What stood on a variant would be help.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    #[default]
    Text,
    Json,
}

/// Where answers, notices and errors go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    format: Format,
}

impl Output {
    /// Output in this format.
    pub(crate) const fn new(format: Format) -> Self {
        Self { format }
    }

    /// Whether programs are to read it.
    pub(crate) fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// Whether a person reads stdout.
    pub(crate) fn is_terminal(self) -> bool {
        io::stdout().is_terminal()
    }

    /// The answer: `shape` for programs, `text` for people.
    pub(crate) fn answer<T: Serialize>(
        self,
        shape: &T,
        text: impl FnOnce() -> String,
    ) -> Result<(), CliError> {
        match self.format {
            Format::Json => self.json(shape),
            Format::Text => self.text(&text()),
        }
    }

    /// Text on stdout, ended with a newline. No text is no line.
    pub(crate) fn text(self, text: &str) -> Result<(), CliError> {
        if text.is_empty() {
            return Ok(());
        }
        let newline = if text.ends_with('\n') { "" } else { "\n" };
        self.bytes([text, newline].concat().as_bytes())
    }

    /// A JSON document on one line of stdout.
    pub(crate) fn json<T: Serialize>(self, shape: &T) -> Result<(), CliError> {
        self.secret_json(shape, 256)
    }

    /// The same for a document that holds a value: the buffer of `capacity` bytes is wiped, and where the document
    /// fits, it never moves.
    pub(crate) fn secret_json<T: Serialize>(self, shape: &T, capacity: usize) -> Result<(), CliError> {
        let mut document = Zeroizing::new(Vec::<u8>::with_capacity(capacity));
        serde_json::to_writer(&mut *document, shape).map_err(|error| {
            CliError::new(Reason::Internal, format!("the answer can't be written as JSON: {error}"))
        })?;
        document.push(b'\n');
        self.bytes(&document)
    }

    /// Bytes on stdout as they are.
    pub(crate) fn bytes(self, bytes: &[u8]) -> Result<(), CliError> {
        write(io::stdout().as_fd(), bytes).map_err(|error| CliError::output(&error))
    }

    /// A line on stderr that stops nothing.
    pub(crate) fn notice(self, text: &str) {
        self.stderr(&format!("claviger: {}\n", printable(text)));
    }

    /// How far long work is: one line on stderr that the next takes the place of, where a person reads it. No text
    /// takes it away.
    pub(crate) fn progress(self, text: &str) {
        if io::stderr().is_terminal() && !self.is_json() {
            // Back to the line's start, and erase it (ECMA-48, EL).
            self.stderr(&format!("\r\u{1b}[K{}", printable(text)));
        }
    }

    /// Why a command did not do what it was asked, on stderr.
    pub(crate) fn error(self, error: &CliError) {
        let Some(reason) = error.reason else { return };
        self.stderr(&match self.format {
            Format::Text => error_text(reason, error),
            Format::Json => error_json(reason, error),
        });
    }

    /// Help and the version, as clap writes them.
    pub(crate) fn clap(self, error: &clap::Error) -> Result<(), CliError> {
        let text = error.render().to_string();
        match error.use_stderr() {
            true => self.stderr(&text),
            false => self.text(&text)?,
        }
        Ok(())
    }

    /// Asks a person for a value, twice, without showing it.
    pub(crate) fn ask_value(self, what: &str) -> Result<Zeroizing<String>, CliError> {
        let value = ask_hidden(&format!("value of {what}: "))?;
        let again = ask_hidden("the same again: ")?;
        if value != again {
            return Err(CliError::usage("the two values differ; nothing was written, try again"));
        }
        Ok(value)
    }

    /// Asks a person for a yes. Whoever is not asked (stdin is no terminal) has not said it.
    pub(crate) fn confirm(self, question: &str) -> Result<bool, CliError> {
        if !io::stdin().is_terminal() {
            return Err(CliError::usage("there is no terminal to confirm on; say --yes"));
        }
        self.stderr(&format!("claviger: {} [y/N] ", printable(question)));
        let mut answer = String::new();
        io::stdin()
            .read_line(&mut answer)
            .map_err(|error| CliError::usage(format!("no answer: {error}; say --yes")))?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    }

    /// Where stderr can't be written there is nobody left to tell.
    fn stderr(self, text: &str) {
        let _ = write(io::stderr().as_fd(), text.as_bytes());
    }
}

/// Writes past the buffers of the standard library, which would keep what passed through them.
fn write(to: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    File::from(to.try_clone_to_owned()?).write_all(bytes)
}

fn ask_hidden(prompt: &str) -> Result<Zeroizing<String>, CliError> {
    rpassword::prompt_password(prompt).map(Zeroizing::new).map_err(|error| {
        CliError::usage(format!("no value could be asked for: {error}; give it on stdin or with --file"))
    })
}

/// One line: what, the stable code, the request. Where several things are wrong, a line for each follows.
fn error_text(reason: Reason, error: &CliError) -> String {
    let message = without_tokens(&error.message);
    let mut lines = message.lines().map(printable);
    let first = lines.next().unwrap_or_default();
    let request =
        error.request_id.as_deref().map(|id| format!(" (request {})", printable(id))).unwrap_or_default();
    let rest: String = lines.map(|line| format!("  {}\n", line.trim_start())).collect();
    format!("claviger: {first} [{reason}]{request}\n{rest}")
}

#[derive(Serialize)]
struct ErrorShape<'a> {
    error: Fault<'a>,
}

#[derive(Serialize)]
struct Fault<'a> {
    reason: &'static str,
    message: &'a str,
    request_id: Option<&'a str>,
}

fn error_json(reason: Reason, error: &CliError) -> String {
    let request_id = error.request_id.as_deref();
    let message = without_tokens(&error.message);
    let shape = ErrorShape { error: Fault { reason: reason.code(), message: &message, request_id } };
    // Three strings always make a document.
    serde_json::to_string(&shape).map(|document| document + "\n").unwrap_or_default()
}

/// Foreign text as it may be shown on a terminal: what breaks lines, moves the cursor or reorders letters is escaped.
pub(crate) fn printable(text: &str) -> String {
    let disruptive = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
    };
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if disruptive(c) { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

/// The text without any of the broker's own tokens, wherever someone put one: `clv_…` is left of it.
pub(crate) fn without_tokens(text: &str) -> String {
    // An id alone has 16 characters; what is longer holds some of the secret.
    const LONGEST_ID: usize = 16;
    let mut parts = text.split("clv_");
    let mut shown = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let foreign = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
        let (token, rest) = part.split_at(part.find(foreign).unwrap_or(part.len()));
        shown.push_str("clv_");
        shown.push_str(if token.len() > LONGEST_ID { "…" } else { token });
        shown.push_str(rest);
    }
    shown
}

/// Columns of plain text under a header. The last column is not padded.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let rows: Vec<[String; N]> = [header.map(str::to_owned)]
        .into_iter()
        .chain(rows.into_iter().map(|row| row.map(|cell| printable(&cell))))
        .collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A time of the wire; `None` where it is unset or out of range.
pub(crate) fn time(time: Option<prost_types::Timestamp>) -> Option<Timestamp> {
    time.and_then(|time| Timestamp::new(time.seconds, time.nanos).ok())
}

/// A time for people: RFC 3339 in UTC, to the second.
pub(crate) fn moment(time: Option<Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), |time| format!("{time:.0}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied() -> CliError {
        let mut error = CliError::new(Reason::Denied, "you may not");
        error.request_id = Some("r-1".to_owned());
        error
    }

    #[test]
    fn an_error_is_one_line_with_its_code_and_request() {
        assert_eq!(error_text(Reason::Denied, &denied()), "claviger: you may not [DENIED] (request r-1)\n");
        let error = CliError::usage("say more");
        assert_eq!(error_text(Reason::InvalidArgument, &error), "claviger: say more [INVALID_ARGUMENT]\n");
    }

    #[test]
    fn several_faults_follow_each_on_its_line() {
        let error = CliError::usage("2 variables are wrong\n  A: x\nB:\u{1b}[2J y");
        let text = error_text(Reason::InvalidArgument, &error);
        assert_eq!(text, "claviger: 2 variables are wrong [INVALID_ARGUMENT]\n  A: x\n  B:\\u{1b}[2J y\n");
    }

    #[test]
    fn an_error_as_json_is_stable() {
        assert_eq!(
            error_json(Reason::Denied, &denied()),
            "{\"error\":{\"reason\":\"DENIED\",\"message\":\"you may not\",\"request_id\":\"r-1\"}}\n"
        );
        assert!(error_json(Reason::InvalidArgument, &CliError::usage("x")).contains("\"request_id\":null"));
    }

    #[test]
    fn foreign_text_moves_no_cursor() {
        assert_eq!(printable("a\tb\u{1b}[31m\u{202e}é"), "a\\tb\\u{1b}[31m\\u{202e}é");
    }

    #[test]
    fn an_error_shows_no_token() {
        let token = format!("clv_{}_{}", "0".repeat(16), "s3-cret_".repeat(5));
        assert_eq!(without_tokens(&format!("a `{token}` and {token}")), "a `clv_…` and clv_…");
        assert_eq!(
            without_tokens("clv_0123456789abcdef, /etc/clv_file: x"),
            "clv_0123456789abcdef, /etc/clv_file: x"
        );
        let error = CliError::usage(format!("no `{token}`"));
        for shown in
            [error_text(Reason::InvalidArgument, &error), error_json(Reason::InvalidArgument, &error)]
        {
            assert!(shown.contains("no `clv_…`"), "{shown}");
        }
    }

    #[test]
    fn columns_are_aligned_and_not_padded_at_the_end() {
        let rows = [["a".to_owned(), "1".to_owned()], ["ünder".to_owned(), "22\n".to_owned()]];
        assert_eq!(table(["NAME", "N"], rows), "NAME   N\na      1\nünder  22\\n\n");
    }

    #[test]
    fn times_are_utc_to_the_second() {
        let at = time(Some(prost_types::Timestamp { seconds: 1_123_456_789, nanos: 5 }));
        assert_eq!(moment(at), "2005-08-07T23:19:49Z");
        assert_eq!(moment(None), "-");
        assert_eq!(time(Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 })), None);
    }
}
