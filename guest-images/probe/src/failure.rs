//! Why a word failed, as the text that follows `FAILED` on its line.
//! Carries no code and no cause: a person or a test's assertion reads it.

use crate::console::Line;
use core::fmt::{self, Write};

pub struct Failure(pub Line);

impl Failure {
    pub fn new(arguments: fmt::Arguments) -> Self {
        let mut line = Line::new();
        let _ = line.write_fmt(arguments);
        Self(line)
    }
}

/// Returns a failure from the enclosing function.
#[macro_export]
macro_rules! fail {
    ($($argument:tt)*) => { return Err($crate::failure::Failure::new(format_args!($($argument)*))) };
}

/// Returns a failure unless the condition holds.
#[macro_export]
macro_rules! check {
    ($condition:expr, $($argument:tt)*) => { if !$condition { $crate::fail!($($argument)*) } };
}

/// The word's result; what it reports goes to the line it was given.
pub type Outcome<T = ()> = Result<T, Failure>;

/// The arena is used up.
pub fn out_of_memory() -> Failure {
    Failure::new(format_args!("the probe's arena is used up"))
}
