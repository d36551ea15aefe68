//! How those that are compared take turns.
//!
//! ```text
//! warm-up: echo, broker    not counted
//! round 1: echo, broker ─▶ ratio 1
//! round 2: broker, echo ─▶ ratio 2     the order turns about, so that a drift within a round hits both alike
//! round 3: echo, broker ─▶ ratio 3
//!                           ╰─ the median of them is the row's ratio
//! ```
//!
//! The median of the paired ratios is what is said, not the ratio of the sums: one turn that the machine spoils
//! (another process, a slow disk) moves a sum by all that it lost, and the median by nothing.

use std::ops::AddAssign;
use std::time::Duration;

/// What came of one turn, or of several.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Turn {
    /// How many answers came.
    pub(crate) answers: u64,
    /// How long it took.
    pub(crate) wall: Duration,
    /// How much processor time the server took for it.
    pub(crate) cpu: Duration,
}

impl Turn {
    /// Answers in a second.
    pub(crate) fn rate(&self) -> f64 {
        self.answers as f64 / self.wall.as_secs_f64()
    }

    /// The server's processor time for each answer, in microseconds.
    pub(crate) fn cpu_each(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.answers as f64
    }

    /// How much of the time the server's core was busy: where this is well below 1, something else was the limit (the
    /// disk, a wake-up, the client), and the rate says less than the processor time.
    pub(crate) fn busy(&self) -> f64 {
        self.cpu.as_secs_f64() / self.wall.as_secs_f64()
    }
}

impl AddAssign for Turn {
    fn add_assign(&mut self, other: Self) {
        self.answers += other.answers;
        self.wall += other.wall;
        self.cpu += other.cpu;
    }
}

/// Has so many contenders take turns, and gives the turns of each that count. `turn` is told whose it is, and which part
/// of a window it is long.
pub(crate) fn take_turns<T>(
    rounds: usize,
    contenders: usize,
    mut turn: impl FnMut(usize, Part) -> T,
) -> Vec<Vec<T>> {
    for contender in 0..contenders {
        turn(contender, Part::Half);
    }
    let mut turns: Vec<Vec<T>> = (0..contenders).map(|_| Vec::with_capacity(rounds)).collect();
    for round in 0..rounds {
        let mut order: Vec<usize> = (0..contenders).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for contender in order {
            turns[contender].push(turn(contender, Part::Whole));
        }
    }
    turns
}

/// How much of a window a turn takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The warm-up.
    Half,
    /// What counts.
    Whole,
}

impl Part {
    pub(crate) fn of(self, window: Duration) -> Duration {
        match self {
            Self::Half => window / 2,
            Self::Whole => window,
        }
    }
}

/// All turns of one, taken together.
pub(crate) fn sum(turns: &[Turn]) -> Turn {
    let mut sum = Turn::default();
    turns.iter().for_each(|turn| sum += *turn);
    sum
}

/// The median of the ratios of `ours` to `bare`, round by round.
pub(crate) fn paired<T>(ours: &[T], bare: &[T], figure: impl Fn(&T) -> f64) -> f64 {
    median(ours.iter().zip(bare).map(|(ours, bare)| figure(ours) / figure(bare)).collect())
}

pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
