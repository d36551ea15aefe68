//! How far long work is: a bar on stderr, where a person reads it.
//!
//! ```text
//! [=========>              ] 12/40 development:database set
//! ```
//! There is none where stderr is no terminal, where the terminal can't move its cursor, and with `--output json`. It has
//! no colours, which is what `NO_COLOR` asks for.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{Output, printable};

const LOOK: &str = "[{bar:24}] {pos}/{len} {wide_msg}";

/// A bar, or nothing. It goes with its owner.
pub(super) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar of `total` steps, which shows with its first step.
    pub(super) fn new(total: u64, output: Output) -> Self {
        let place =
            if output.is_json() { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        Self::on(place, total)
    }

    fn on(place: ProgressDrawTarget, total: u64) -> Self {
        let style = ProgressStyle::with_template(LOOK).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(total), place).with_style(style.progress_chars("=> "));
        Self { bar }
    }

    /// So many of so many are done.
    pub(super) fn reached(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    /// One more is done.
    pub(super) fn one_more(&self) {
        self.bar.inc(1);
    }

    /// What is being done now.
    pub(super) fn at(&self, what: &str) {
        self.bar.set_message(printable(what));
    }

    /// Writes something else to the terminal: the bar makes room for it.
    pub(super) fn aside<R>(&self, write: impl FnOnce() -> R) -> R {
        self.bar.suspend(write)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::Format;
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};

    /// A terminal of 100 columns that keeps what is written on it.
    #[derive(Debug, Clone, Default)]
    struct Paper(Arc<Mutex<String>>);

    impl Paper {
        fn text(&self) -> String {
            self.0.lock().unwrap().clone()
        }

        fn write(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }
    }

    impl indicatif::TermLike for Paper {
        fn width(&self) -> u16 {
            100
        }

        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write(&format!("{text}\n"))
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            self.write(text)
        }

        fn clear_line(&self) -> io::Result<()> {
            self.write("|")
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_bar_shows_how_many_and_which_without_a_colour_and_goes_at_the_end() {
        let paper = Paper::default();
        let progress = Progress::on(ProgressDrawTarget::term_like(Box::new(paper.clone())), 0);
        progress.reached(2, 4);
        progress.at("development:jwt\u{1b}[31m set");
        let shown = paper.text();
        assert!(shown.contains("2/4") && shown.contains("development:jwt\\u{1b}[31m set"), "{shown:?}");
        assert!(shown.contains("[============") && !shown.contains('\u{1b}'), "{shown:?}");
        progress.one_more();
        assert!(paper.text().contains("3/4"));
        assert!(progress.aside(|| paper.text().ends_with('|')), "room is made first");
        assert!(!paper.text().ends_with('|'), "and then it is back");
        drop(progress);
        assert!(paper.text().ends_with('|'), "{:?}", paper.text());
    }

    #[test]
    fn programs_get_no_bar() {
        assert!(Progress::new(3, Output::new(Format::Json)).bar.is_hidden());
    }
}
