//! The jail, from inside: this program runs itself again exactly as a VMM is started and tries to get out. Each
//! attempt is refused by the whole jail and gets through when the walls that stop it are left out, so no test can
//! pass for want of trying. Needs root. What other projects' jailers are tested for is in README.md, by name.

mod attacker;
mod calls;
mod cell;
mod landlock;
mod racer;
mod walls;
